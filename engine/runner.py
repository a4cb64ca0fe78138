"""The one thread that computes: schedule a step, run it, draw the tokens, hand out what happened. Over and over.

Torch releases the interpreter while it computes, so the event loop stays free. What happened to all answers of a step
is handed over in one call of `deliver`, on this thread; it must not block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention import KvPool
from engine.checkpoint import Checkpoint
from engine.errors import ShuttingDown
from engine.executor import Executor, Outcome
from engine.sampling import Choice, Drawing, Guide, SamplingParams, describe, draw
from engine.scheduler import Chunk, Scheduler, Step
from engine.sequence import NO_CHUNKS, State, Used
from engine.sequence import Sequence as Row
from engine.stops import StopMatcher

_SCORED_AT_ONCE = 64
"""Prompt tokens whose scores are held at once when log probabilities of the prompt are wanted."""

_QUIET = 1.0
"""Seconds without work after which the blocks' books are checked, once."""

_GLANCE = 0.01
"""Seconds after which sequences that wait for their chunks are looked at again, should nobody say that they came."""

FinishReason = Literal["stop", "length"]
log = logging.getLogger("hitpath.engine")


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt has been computed. The first event of every job that does not fail before."""

    cached: int
    """Prompt tokens that did not have to be computed."""
    choices: tuple[Choice | None, ...] = ()
    """With `prompt_logprobs`: one per prompt token, None for the first."""
    kept: int = 0
    """Further prompt tokens that were not computed, since chunks brought them."""
    used: Used = NO_CHUNKS
    """What chunks did for it, where they did."""


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
    status: int = 500
    code: str = "generation_failed"


Event = Prompted | Progress | Finished | Failed
Happened = list[tuple["Job", Event]]


class AnswerGuide(Guide, Protocol):
    """Rules which tokens may come next, told of every token that came."""

    def advance(self, token: int) -> None:
        """Take note of a drawn token."""

    @property
    def finished(self) -> bool:
        """Whether nothing but the end can follow."""


@dataclass(eq=False, slots=True)
class Job:
    """One answer to generate."""

    prompt: Sequence[int]
    params: SamplingParams
    emit: Callable[[Event], None]
    """Called by whoever `deliver` hands the events to."""
    tenant: str = ""
    """Unit of fairness; also, blocks are never shared between tenants."""
    guide: AnswerGuide | None = None
    parent: Job | None = None
    """The first answer to the same prompt, for the second to the n-th."""
    prompt_logprobs: bool = False
    spans: Sequence[tuple[int, int]] = ()
    """Tokens of its prompt that its client marked as texts of their own: from the first to behind the last."""
    exact: bool = False
    """Nothing may be reused but what was computed in exactly this place."""
    cancelled: bool = field(default=False, init=False)
    """Set by `Runner.cancel`: the job ends before its next token, without a further event."""


class Watch(Protocol):
    """Who counts what happens; called on the worker's thread."""

    def scheduled(self, step: Step) -> None:
        """A step is about to be computed."""
        ...

    def step(self, happened: Happened) -> None:
        """What a step brought."""
        ...


class Library(Protocol):
    """Who has chunks for prompts."""

    def begin(self, job: Job, row: Row) -> None:
        """Look for chunks of a sequence that is about to be queued: sets its `reuse`, and its `salt` with it, or not.

        With the runner's lock held: must not block.
        """
        ...

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens, some of a prompt among them, and waited for nothing."""
        ...

    def told(self, pool: KvPool) -> None:
        """What a step brought was told, and nothing was computed since: a moment to read what it left in the pool."""
        ...

    def idle(self) -> bool:
        """Nothing runs or waits: do a small piece of what is left for such moments, if there is any."""
        ...


class _Answer:
    """A job under way: its row of tokens, its draws, its text."""

    def __init__(self, job: Job, row: Row, checkpoint: Checkpoint) -> None:
        self.job, self.row = job, row
        self.drawing = Drawing(job.params, job.prompt, checkpoint.eos_ids, job.guide)
        self._ends = set(job.params.stop_token_ids)
        if not job.params.ignore_eos:
            self._ends |= checkpoint.eos_ids
        self._text = checkpoint.tokenizer.detokenizer()
        self._stops = StopMatcher(job.params.stop)
        self._scored: list[Choice | None] = [None] if job.prompt_logprobs else []
        self._told = False

    def score(self, chunk: Chunk, choices: Iterable[Choice]) -> None:
        """Take the log probabilities of the prompt tokens that follow those of `chunk`."""
        if len(self._scored) == chunk.start + 1:  # otherwise a preempted prompt is computed once more
            self._scored += choices

    def take(self, choice: Choice) -> list[Event]:
        """What one drawn token means; the answer is over if the last event is Finished."""
        events: list[Event] = []
        if not self._told:
            self._told = True
            kept = 0 if self.row.kept is None else len(self.row.kept)
            used = NO_CHUNKS if self.row.reuse is None else self.row.reuse.used
            events.append(Prompted(self.row.cached, tuple(self._scored[: len(self.job.prompt)]), kept, used))
        params, drawn = self.job.params, self.row.drawn + 1
        if params.max_tokens == 0:
            return [*events, Finished("length", "", 0)]
        complete = False
        if self.job.guide is not None:
            self.job.guide.advance(choice.token)
            complete = self.job.guide.finished
        if choice.token in self._ends:
            return [*events, Finished("stop", self._tail()[0], drawn)]
        text, stopped = self._stops.push(self._text.push(choice.token))
        events.append(Progress(text, choice))
        if stopped:
            events.append(Finished("stop", "", drawn))
        elif complete or drawn >= params.max_tokens:
            tail, stopped = self._tail()
            events.append(Finished("stop" if stopped or complete else "length", tail, drawn))
        return events

    def _tail(self) -> tuple[str, bool]:
        """What was held back, when nothing follows; it may still complete a stop string."""
        text, stopped = self._stops.push(self._text.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)


class Runner:
    """Queue and worker thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheduler: Scheduler,
        executor: Executor,
        *,
        deliver: Callable[[Happened], None],
        watch: Watch | None = None,
        library: Library | None = None,
    ) -> None:
        self._checkpoint, self._scheduler, self._executor = checkpoint, scheduler, executor
        self._deliver, self._watch, self._library = deliver, watch, library
        self._changed = threading.Condition()
        # Scheduler and answers belong to whoever holds `_changed`; the worker lets go of it while the model computes.
        self._answers: dict[Row, _Answer] = {}
        self._rows: dict[Job, Row] = {}
        self._cancelled: list[Job] = []
        self._closed = False
        self.sheds = 0
        """Answers given up for want of memory."""
        self.check_failures = 0
        """How often the books of the blocks were found wrong when idle."""
        self._checked = True
        self._thread = threading.Thread(target=self._work, name="hitpath-engine", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of them or none. Raises QueueFull, ShuttingDown."""
        with self._changed:
            if self._closed:
                raise ShuttingDown
            rows: dict[Job, Row] = {}
            for job in jobs:
                rows[job] = self._row(job, rows)
            self._queue(rows)
            for job, row in rows.items():
                self._answers[row] = _Answer(job, row, self._checkpoint)
            self._rows.update(rows)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End them before their next token; finished ones are left alone."""
        with self._changed:
            for job in jobs:
                if (row := self._rows.get(job)) is None:
                    continue
                job.cancelled = True
                if row.state is State.WAITING:
                    self._drop(row)
                else:
                    # Its blocks may be written to right now; the worker takes it out between two steps.
                    self._cancelled.append(job)
            self._changed.notify()

    def wake(self) -> None:
        """Chunks that a sequence was held for have come, or will not come."""
        with self._changed:
            self._changed.notify()

    def depth(self) -> tuple[int, int]:
        """How many are running and how many wait."""
        with self._changed:
            return self._scheduler.depth()

    def close(self) -> None:
        """Cancel everything and end the thread; returns when it is gone."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _queue(self, rows: dict[Job, Row]) -> None:
        if self._library is not None:
            for job, row in rows.items():
                self._library.begin(job, row)
        try:
            self._scheduler.add(list(rows.values()), time.monotonic())
        except Exception:
            for row in rows.values():
                if row.reuse is not None:
                    row.reuse.released(row)
            raise

    def _row(self, job: Job, siblings: dict[Job, Row]) -> Row:
        model, length = self._checkpoint.model, len(job.prompt)
        # Keys turned by angles that depend on the length serve prompts of that length only.
        stretched = model.rope.stretches and length > model.config.max_positions
        return Row(
            list(job.prompt),
            job.params,
            tenant=job.tenant,
            salt=str(length) if stretched else "",
            parent=None if job.parent is None else siblings.get(job.parent),
            fresh=job.prompt_logprobs,
        )

    def _work(self) -> None:
        with torch.inference_mode():
            while (step := self._next()) is not None:
                if self._watch is not None:
                    self._watch.scheduled(step)
                happened = [(job, event) for job, event in self._run(step) if not job.cancelled]
                if self._watch is not None:
                    self._watch.step(happened)
                self._deliver(happened)
                if self._library is not None:
                    self._library.told(self._executor.pool)

    def _next(self) -> Step | None:
        """The next step, waiting for work if there is none; None when closed."""
        unasked = self._library is not None
        while True:
            with self._changed:
                self._drop_cancelled()
                if self._closed:
                    self._cancelled += self._rows
                    self._drop_cancelled()
                    return None
                step = self._scheduler.schedule(time.monotonic())
                if step is not None:
                    for row in step.preempted:
                        self._executor.forget(row)
                    return step
                if not unasked or self._scheduler.depth()[1]:
                    self._rest()
                    unasked = self._library is not None
                    continue
            # Without the lock: a request that comes now waits for one piece of background work at most.
            unasked = self._library is not None and self._library.idle()

    def _rest(self) -> None:
        """Wait for something to do; when nothing came for a while, see whether the books are in order."""
        if self._scheduler.depth()[1]:
            self._changed.wait(_GLANCE)
        elif self._checked:
            self._changed.wait()
        elif not self._changed.wait(_QUIET):
            self._checked = True
            try:
                self._scheduler.check()
            except Exception:  # serving goes on; the counter tells
                self.check_failures += 1
                log.exception("the blocks' books are wrong")
            return
        self._checked = False

    def _drop_cancelled(self) -> None:
        for job in self._cancelled:
            if (row := self._rows.get(job)) is not None:
                self._drop(row)
        self._cancelled.clear()

    def _drop(self, row: Row) -> None:
        self._scheduler.cancel((row,))
        self._forget(row)

    def _forget(self, row: Row) -> None:
        self._executor.forget(row)
        del self._rows[self._answers.pop(row).job]

    def _run(self, step: Step) -> Happened:
        """Run a step; where it breaks, run its chunks one by one, so that only the broken ones fail."""
        try:
            self._executor.copy(step.copies)
        except Exception as error:  # a block that was not copied must not be written to
            return [event for chunk in step.chunks for event in self._fail(chunk.sequence, error)]
        try:
            return self._finish(step, self._timed(step))
        except Exception as error:  # whatever breaks, the others go on
            if len(step.chunks) == 1:
                return self._fail(step.chunks[0].sequence, error)
            if _out_of_memory(error):
                # Nothing of the step was taken over: what is left of it is scheduled again.
                return self._fail(max((chunk.sequence for chunk in step.chunks), key=lambda row: row.order), error)
            log.warning("a step of %d sequences failed (%s); running them one by one", len(step.chunks), error)
        happened: Happened = []
        for chunk in step.chunks:
            happened += self._run(Step((chunk,), (), ()))
        return happened

    def _timed(self, step: Step) -> Outcome:
        """Run it, and tell the library how long that took, where it did not wait for chunks."""
        began = time.monotonic()
        outcome = self._executor.run(step.chunks)
        if self._library is not None and any(chunk.size > 1 for chunk in step.chunks):
            blended = (chunk.sequence.blended for chunk in step.chunks)
            if all(one is None or one.source is None for one in blended):
                self._library.computed(sum(chunk.size for chunk in step.chunks), time.monotonic() - began)
        return outcome

    def _take(self, row: Row, choice: Choice) -> list[Event]:
        try:
            return self._answers[row].take(choice)
        except Exception as error:  # of this answer alone: its text, its guide
            log.error("an answer broke", exc_info=error)
            return [Failed(f"Generation failed: {type(error).__name__}.")]

    def _fail(self, row: Row, error: Exception) -> Happened:
        log.error("generation failed", exc_info=error)
        starved = _out_of_memory(error)
        failed = Failed(
            "The engine ran out of memory; try again later."
            if starved
            else f"Generation failed: {type(error).__name__}.",
            status=503 if starved else 500,
            code="out_of_memory" if starved else "generation_failed",
        )
        with self._changed:
            self.sheds += starved
            job = self._answers[row].job
            self._scheduler.finish(row)
            self._forget(row)
        return [(job, failed)]

    def _finish(self, step: Step, outcome: Outcome) -> Happened:
        """Draw the tokens of a computed step and see what they mean."""
        if outcome.lost or outcome.dropped:
            step = self._settle(step, outcome)
        self._score_prompts(step, outcome)
        self._tell_prefilled(step)
        rows = [chunk.sequence for chunk in step.chunks if chunk.draws]
        self._tell_scored(rows, outcome.scores)
        choices = draw(outcome.scores, [self._answers[row].drawing for row in rows]) if rows else []
        happened: Happened = []
        over: list[Row] = []
        for row, choice in zip(rows, choices, strict=True):
            job, events = self._answers[row].job, self._take(row, choice)
            happened += [(job, event) for event in events]
            if isinstance(events[-1], Finished | Failed):
                over.append(row)
        with self._changed:
            self._scheduler.complete(step, {row: choice.token for row, choice in zip(rows, choices, strict=True)})
            for row in over:
                self._scheduler.finish(row)
                self._forget(row)
        return happened

    def _settle(self, step: Step, outcome: Outcome) -> Step:
        """The step without those whose chunks did not come."""
        with self._changed:
            self._scheduler.settle(outcome.lost, outcome.dropped)
        return replace(step, chunks=tuple(chunk for chunk in step.chunks if chunk.sequence not in outcome.lost))

    def _tell_prefilled(self, step: Step) -> None:
        for chunk in step.chunks:
            row = chunk.sequence
            if row.reuse is None or not chunk.start < len(row.prompt) <= chunk.start + chunk.count:
                continue
            try:
                row.reuse.prefilled(row, self._executor.pool, self._executor.slots(row, np.arange(len(row.prompt))))
            except Exception:  # the answer does not depend on what is kept of its prompt
                log.exception("a prompt's chunks could not be taken")

    def _tell_scored(self, rows: Sequence[Row], scores: Tensor) -> None:
        for row, own in zip(rows, scores, strict=True) if self._library is not None else ():
            if row.reuse is not None and not row.drawn:
                row.reuse.scored(row, own)

    def _score_prompts(self, step: Step, outcome: Outcome) -> None:
        """Log probabilities of prompts whose requests want them, a few tokens at a time."""
        start = 0
        for chunk in step.chunks:
            if not chunk.sequence.fresh:
                continue
            hidden = outcome.prompt[start : start + chunk.count]
            start += chunk.count
            answer, prompt = self._answers[chunk.sequence], chunk.sequence.prompt
            following = prompt[chunk.start + 1 : chunk.start + chunk.count + 1]
            wanted = answer.job.params.logprobs or 0
            choices: list[Choice] = []
            for at in range(0, len(following), _SCORED_AT_ONCE):
                tokens = following[at : at + _SCORED_AT_ONCE]
                scores = self._executor.logits(hidden[at : at + len(tokens)])
                choices += describe(scores, tokens, [wanted] * len(tokens))
            answer.score(chunk, choices)


def _out_of_memory(error: Exception) -> bool:
    """Torch says so by a type on CUDA, by a message on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
