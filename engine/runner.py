"""The one thread that computes: it takes jobs from a bounded queue and gives every running one a token in turn.

Torch releases the interpreter while it computes, so the event loop stays free. Events of a job are handed over through
its `emit`, which is called on this thread and must not block.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from engine.checkpoint import Checkpoint
from engine.errors import QueueFull, ShuttingDown
from engine.model import ContiguousCache
from engine.sampling import Choice, Sampler, SamplingParams
from engine.stops import StopMatcher
from engine.tokenizer import Detokenizer

PREFILL_CHUNK = 512
"""Tokens of a prompt computed in one go; between two of them others get their turn and a cancellation is seen."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One more token; its text may be empty while a character or a stop string is undecided."""

    text: str
    choice: Choice


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete; `text` is what had been held back."""

    reason: FinishReason
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Generation broke; the message is for the client, the log has the rest."""

    message: str


Event = Progress | Finished | Failed


@dataclass(eq=False, slots=True)
class Job:
    """One answer to generate."""

    prompt: Sequence[int]
    params: SamplingParams
    emit: Callable[[Event], None]
    cancelled: bool = field(default=False, init=False)
    """Set by anyone, at any time: the job ends before its next token, without a further event."""

    def cost(self) -> int:
        """Tokens of KV memory that the answer may come to need."""
        return len(self.prompt) + self.params.max_tokens


class _Sequence:
    """A running job: its cache, its sampler, its text."""

    def __init__(self, job: Job, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self.job = job
        self._checkpoint = checkpoint
        self._cache = ContiguousCache(config, job.cost(), dtype=checkpoint.dtype, device=checkpoint.device)
        self._sampler = Sampler(job.params, config.vocab_size, checkpoint.eos_ids)
        self._text = Detokenizer(checkpoint.tokenizer.decode)
        self._stops = StopMatcher(job.params.stop)
        self._pending: Sequence[int] = job.prompt
        self._length = 0
        self._drawn = 0

    def step(self) -> tuple[Event, ...]:
        """Compute the next chunk of the prompt, or the next token. Nothing while the prompt is not through."""
        chunk, self._pending = self._pending[:PREFILL_CHUNK], self._pending[PREFILL_CHUNK:]
        device = self._checkpoint.device
        ids = torch.tensor([chunk], device=device)
        positions = torch.arange(self._length, self._length + len(chunk), device=device)[None]
        hidden = self._checkpoint.model(ids, positions, self._cache)
        self._length += len(chunk)
        if self._pending:
            return ()
        choice = self._sampler.draw(self._checkpoint.model.logits(hidden[0, -1]))
        self._drawn += 1
        self._pending = [choice.token]
        return self._advance(choice)

    def _advance(self, choice: Choice) -> tuple[Event, ...]:
        params = self.job.params
        if choice.token in self._checkpoint.eos_ids and not params.ignore_eos:
            return (Finished("stop", self._tail()[0], self._drawn),)
        text, stopped = self._stops.push(self._text.push(choice.token))
        progress = Progress(text, choice)
        if stopped:
            return (progress, Finished("stop", "", self._drawn))
        if self._drawn < params.max_tokens:
            return (progress,)
        tail, stopped = self._tail()
        return (progress, Finished("stop" if stopped else "length", tail, self._drawn))

    def _tail(self) -> tuple[str, bool]:
        """What was held back, when nothing follows; it may still complete a stop string."""
        text, stopped = self._stops.push(self._text.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)


class Runner:
    """Queue and worker thread."""

    def __init__(
        self, checkpoint: Checkpoint, *, kv_tokens: int, max_running: int, max_waiting: int, threads: int
    ) -> None:
        """`kv_tokens`: tokens whose keys and values may be held at once, over all running answers."""
        self._checkpoint = checkpoint
        self._kv_tokens, self._max_running, self._max_waiting = kv_tokens, max_running, max_waiting
        self._threads = threads
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[_Sequence] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hitpath-engine", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of them or none. Raises QueueFull, ShuttingDown."""
        with self._changed:
            if self._closed:
                raise ShuttingDown
            # An idle engine takes any request whole; a bound below its own size would refuse it for ever.
            if self._waiting and len(self._waiting) + len(jobs) > self._max_waiting:
                raise QueueFull(self._max_waiting)
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End them before their next token; finished ones are left alone."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            # The running ones belong to the worker; it drops them itself before their next token.
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def depth(self) -> tuple[int, int]:
        """How many are running and how many wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def close(self) -> None:
        """Cancel everything and end the thread; returns when it is gone."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while self._admit():
                for sequence in list(self._running):
                    self._step(sequence)

    def _admit(self) -> bool:
        """Wait for work and take in what fits; False when closed."""
        with self._changed:
            self._running = [sequence for sequence in self._running if not sequence.job.cancelled]
            while not self._closed and not self._running and not self._waiting:
                self._changed.wait()
            held = sum(sequence.job.cost() for sequence in self._running)
            while self._waiting and len(self._running) < self._max_running:
                # In order: a large request is not overtaken for ever by small ones.
                if self._running and held + self._waiting[0].cost() > self._kv_tokens:
                    break
                job = self._waiting.popleft()
                held += job.cost()
                self._running.append(_Sequence(job, self._checkpoint))
            return not self._closed

    def _step(self, sequence: _Sequence) -> None:
        if sequence.job.cancelled:
            return
        try:
            events = sequence.step()
        except Exception as error:  # one answer failing (out of memory, say) must not end the others
            logging.getLogger("hitpath.engine").exception("generation failed")
            events = (Failed(f"Generation failed: {type(error).__name__}."),)
        if events and isinstance(events[-1], Finished | Failed):
            with self._changed:
                self._running.remove(sequence)
        for event in events:
            sequence.job.emit(event)
