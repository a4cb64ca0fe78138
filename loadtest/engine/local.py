"""The engine without HTTP: its worker in this process, with a stopwatch around the model."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from engine.attention.choose import choose
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint
from engine.executor import BLOCK_SIZE, Executor, Outcome
from engine.runner import Event, Failed, Finished, Happened, Job, Progress, Prompted, Runner
from engine.sampling import SamplingParams
from engine.scheduler import Chunk, Scheduler, Step
from loadtest.bench_client import BenchError

_TOKEN_BUDGET = 512
_MAX_RUNNING = 64


@dataclass(slots=True)
class Timed:
    """One answer: seconds from when it was asked for."""

    cached: int = 0
    """Prompt tokens that did not have to be computed."""
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Steps:
    """Seconds from step to step where both only decode, by how many answers they serve, and those in the model."""

    whole: dict[int, list[float]] = field(default_factory=dict)
    model: dict[int, list[float]] = field(default_factory=dict)

    def of(self, answers: int) -> tuple[float, float]:
        """Medians of both for steps of so many answers. Raises BenchError when there was none."""
        if answers not in self.whole:
            raise BenchError(f"no step served {answers} answers: {sorted(self.whole)} did")
        return median(self.whole[answers]), median(self.model[answers])


class _Stopwatch(Executor):
    """The executor, timed."""

    spent = 0.0

    def run(self, chunks: tuple[Chunk, ...]) -> Outcome:
        began = time.perf_counter()
        outcome = super().run(chunks)
        self.spent = time.perf_counter() - began
        return outcome


class Local:
    """A runner and what asks it."""

    def __init__(self, checkpoint: Checkpoint, *, tokens: int, threads: int) -> None:
        """`tokens`: room for keys and values."""
        blocks = -(-tokens // BLOCK_SIZE)
        backend = choose(checkpoint.config, dtype=checkpoint.dtype, device=checkpoint.device, block_size=BLOCK_SIZE)
        self._executor = _Stopwatch(checkpoint, backend, blocks=blocks, context=tokens, threads=threads)
        books = BlockManager(blocks, BLOCK_SIZE, root=b"bench")
        scheduler = Scheduler(
            books, max_running=_MAX_RUNNING, max_waiting=1024, token_budget=_TOKEN_BUDGET, patience=600
        )
        self._runner = Runner(checkpoint, scheduler, self._executor, deliver=_hand_out, watch=self)
        self._decoding = 0
        self._ended: tuple[int, float] = (0, 0.0)
        """Answers of the step before if it only decoded, and when it ended."""
        self.steps = Steps()

    @contextlib.contextmanager
    def running(self) -> Iterator[Local]:
        """With the worker started."""
        self._runner.start()
        try:
            yield self
        finally:
            self._runner.close()

    def together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Timed]:
        """Ask for all at once; each answer has exactly `tokens` tokens. Raises BenchError when one fails."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        heard: queue.SimpleQueue[tuple[int, Event, float]] = queue.SimpleQueue()
        jobs = [Job(prompt, params, partial(_stamp, heard, index)) for index, prompt in enumerate(prompts)]
        timed, left = [Timed() for _ in jobs], len(jobs)
        began = time.perf_counter()
        self._runner.submit(jobs)
        while left:
            index, event, now = heard.get()
            answer = timed[index]
            match event:
                case Prompted(cached):
                    answer.cached, answer.first = cached, now - began
                case Progress():
                    answer.tokens, answer.last = answer.tokens + 1, now - began
                case Finished():
                    left -= 1
                case Failed(message):
                    raise BenchError(f"an answer failed: {message}")
        if any(answer.tokens != tokens for answer in timed):
            raise BenchError(f"asked for {tokens} tokens each, got {[answer.tokens for answer in timed]}")
        return timed

    def scheduled(self, step: Step) -> None:
        """A step begins."""
        self._decoding = len(step.chunks) if all(chunk.draws and chunk.count == 1 for chunk in step.chunks) else 0

    def step(self, happened: Happened) -> None:
        """A step has ended. It took as long as it ended after one of its kind: scheduling and handing out count too."""
        now = time.perf_counter()
        answers, before = self._ended
        if answers and answers == self._decoding:
            self.steps.whole.setdefault(answers, []).append(now - before)
            self.steps.model.setdefault(answers, []).append(self._executor.spent)
        # The next step may begin long after one that ended an answer.
        over = any(isinstance(event, Finished) for _, event in happened)
        self._ended = (0, 0.0) if over else (self._decoding, now)


def _stamp(heard: queue.SimpleQueue[tuple[int, Event, float]], index: int, event: Event) -> None:
    heard.put((index, event, time.perf_counter()))


def _hand_out(happened: Happened) -> None:
    for job, event in happened:
        job.emit(event)
