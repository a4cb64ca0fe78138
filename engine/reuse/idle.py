"""What is done when there is nothing else to do: chunks are computed better, and reuse is compared with doing without.

Every job is a generator that yields after each piece of computing, so that a request that comes waits for one piece at
most. Jobs run on the worker's thread, each in memory of its own that is given back when it ends.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from engine.attention import AttentionBackend
from engine.checkpoint import Checkpoint
from engine.reuse.cachecraft import Observer
from engine.reuse.chunks import ChunkKv
from engine.reuse.known import Text
from engine.reuse.point import Stored
from engine.reuse.sensitivity import averaged, measured
from engine.reuse.steps import Blended
from engine.reuse.trial import Trial

PIECE = 256
"""Tokens computed at once: what a request may have to wait for."""

ELSEWHERE = 2
"""Texts that a chunk is computed behind to see how much it changes."""

LONGEST = 8192
"""Tokens of a prompt that is observed, at the most: each has its place in memory meanwhile."""

_MOST_REFINEMENTS, _MOST_OBSERVATIONS, _MOST_CHECKS = 1024, 64, 16
"""Jobs that may wait; beyond, the oldest are forgotten."""

_log = logging.getLogger("hitpath.engine")


@dataclass(frozen=True, slots=True)
class Refinement:
    """A text whose chunk is worth computing again."""

    text: Text
    tokens: tuple[int, ...]
    tenant: str
    head: tuple[int, ...]
    """What its template begins with, up to the first chunk of a prompt."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A prompt of which texts are to be kept as they are in it, with their context indices."""

    tokens: tuple[int, ...]
    tenant: str
    texts: tuple[tuple[int, bytes], ...]
    """See `cachecraft.in_order`."""
    wanted: tuple[tuple[Text, int, int], ...]
    """Those to be kept, from the first token to behind the last; each begins with one of `texts`."""


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """A prompt whose first token is to be compared."""

    tokens: Sequence[int]
    served: Tensor
    """Scores [V] that its answer was begun with."""
    unused: Blended | None = None
    """What was not placed, where the answer was computed in full."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a check found."""

    kl: float
    """Nats: KL(full ‖ blended)."""
    agrees: bool


class IdleJobs:
    """The queue. `put` on any thread that the runner's lock protects from the worker, `step` on the worker."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: AttentionBackend,
        stored: Stored,
        *,
        seen: Callable[[Text], ChunkKv | None],
        others: Callable[[Text, int], Sequence[tuple[int, ...]]],
        refined: Callable[[Refinement, ChunkKv], None],
        indexed: Callable[[Text, str, ChunkKv], None],
        compared: Callable[[Compared], None],
    ) -> None:
        """`seen`: a chunk as a prompt computed it, if it is at hand. `others`: texts to compute a chunk behind. The
        last three take the results; `indexed` is told text and tenant.
        """
        self._checkpoint, self._backend = checkpoint, backend
        self._stored, self._seen, self._others = stored, seen, others
        self._refined, self._indexed, self._compared = refined, indexed, compared
        self._observations: deque[Observation] = deque(maxlen=_MOST_OBSERVATIONS)
        self._refinements: OrderedDict[Text, Refinement] = OrderedDict()
        self._checks: deque[Check] = deque(maxlen=_MOST_CHECKS)
        self._job: Iterator[None] | None = None
        self._refining: Text | None = None

    def __len__(self) -> int:
        """Jobs that wait or are under way."""
        waiting = len(self._refinements) + len(self._observations) + len(self._checks)
        return waiting + (self._job is not None)

    def refine(self, refinement: Refinement) -> None:
        """To be done; not twice at the same time."""
        if refinement.text == self._refining:
            return
        self._refinements.setdefault(refinement.text, refinement)
        if len(self._refinements) > _MOST_REFINEMENTS:
            self._refinements.popitem(last=False)

    def observe(self, observation: Observation) -> None:
        """To be done, but for texts that wait for that already: what comes of those may do for this prompt, too."""
        waiting = {text for other in self._observations for text, *_ in other.wanted}
        if wanted := tuple(one for one in observation.wanted if one[0] not in waiting):
            self._observations.append(replace(observation, wanted=wanted))

    def check(self, check: Check) -> None:
        """To be done."""
        self._checks.append(check)

    def step(self) -> bool:
        """Do one piece; whether there was any."""
        self._job = self._job or self._next()
        if self._job is None:
            return False
        try:
            next(self._job)
        except StopIteration:
            self._job = None
        except Exception:  # it was of use to nobody yet
            self._job = None
            _log.warning("background work on stored chunks failed", exc_info=True)
        return True

    def _next(self) -> Iterator[None] | None:
        if self._checks:
            return self._check(self._checks.popleft())
        if self._observations:
            return self._observe(self._observations.popleft())
        if self._refinements:
            return self._refine(self._refinements.popitem(last=False)[1])
        return None

    def _refine(self, job: Refinement) -> Iterator[None]:
        self._refining = job.text
        others = [*self._others(job.text, ELSEWHERE), _backwards(job.tokens)][:ELSEWHERE]
        versions: list[ChunkKv] = []
        before: list[tuple[int, ...]] = [(*job.head, *other[: 2 * PIECE]) for other in others]
        match self._stored:
            case "mean" if len(before) > 1:
                pass
            case "mean" | "head":
                before.insert(0, job.head)
            case "alone":
                before.insert(0, ())
            case "seen" if (seen := self._seen(job.text)) is not None:
                versions.append(seen)
            case "seen":
                before.insert(0, job.head)
            case _ as never:
                assert_never(never)
        trial = Trial(self._checkpoint, max(map(len, before)) + len(job.tokens), self._backend)
        for after in before:
            whole = [*after, *job.tokens]
            for _ in trial.pieces(whole, PIECE):
                yield
            versions.append(trial.taken(whole, len(after), len(whole)))
        several = self._stored == "mean"
        self._refined(job, averaged(versions) if several else measured(versions[0], versions[1:]))

    def _observe(self, job: Observation) -> Iterator[None]:
        """Not what the prompt had: that may have been computed behind chunks that are not exact."""
        trial = Trial(self._checkpoint, len(job.tokens), self._backend)
        observer = Observer(job.texts, len(job.tokens), self._checkpoint.config.windows)
        for _ in trial.pieces(job.tokens, PIECE, observer):
            yield
        for text, start, stop in job.wanted:
            self._indexed(text, job.tenant, trial.taken(job.tokens, start, stop, observer.context(start, stop)))
            yield

    def _check(self, job: Check) -> Iterator[None]:
        trial = Trial(self._checkpoint, len(job.tokens), self._backend)
        if job.unused is not None:
            blended = trial.blend(job.unused.prompt, job.unused.selector, 1)
            yield
            self._compared(compared(job.served, blended))
            return
        full = job.served
        for piece in trial.pieces(job.tokens, PIECE):
            full = piece
            yield
        self._compared(compared(full, job.served))


def compared(full: Tensor, blended: Tensor) -> Compared:
    """Divergence of two rows of scores, [V] or [1, V]."""
    one, other = (torch.log_softmax(scores.float().flatten(), 0) for scores in (full, blended))
    kl = float((one.exp() * (one - other)).nan_to_num().sum())
    return Compared(max(0.0, kl), bool(one.argmax() == other.argmax()))


def _backwards(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Something else to stand behind, where too little else is known."""
    return tokens[::-1]
