"""One answer in the making, as scheduler, blocks and runner see it. Plain state, no tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.sampling import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from engine.attention import KvPool
    from engine.reuse.steps import Blended

Positions = NDArray[np.int64]
"""Places in a sequence, ascending."""


def by_worth(kept: Positions, missed: NDArray[np.float32] | None) -> NDArray[np.int64]:
    """Kept tokens in the order of their repair, from what each place is missed; the first ones first where that is
    the same or not known."""
    return kept if missed is None else kept[np.argsort(-missed[kept], kind="stable")]


TIERS = ("none", "pool", "memory", "disk", "redis")
"""Where chunks come from, as clients are told it: no chunks, then from fast to slow."""


@dataclass(frozen=True, slots=True, eq=False)
class Dropped:
    """Tokens of a piece that were not computed in all layers: chunks had brought them."""

    positions: Positions
    missed: NDArray[np.float32] | None = None
    """What each is missed, where that is known and asked for."""


@dataclass(frozen=True, slots=True)
class Used:
    """What chunks did for one prompt."""

    chunks: int = 0
    kept: int = 0
    """Tokens of them that were not computed …"""
    recomputed: int = 0
    """… and that were."""
    tier: str = TIERS[0]
    """The slowest one that they came from."""


NO_CHUNKS = Used()


class Reuse(Protocol):
    """The stored chunks of one sequence, on their way or there.

    All but `prefilled` are called with the runner's lock held, and none may block or raise. Who changes its mind about
    `held` calls `Runner.wake`, holding no lock that is taken here.
    """

    def held(self, idle: bool) -> bool:
        """Whether it had better not be admitted yet. `idle`: nobody else would run meanwhile."""
        ...

    def likely(self, first: int) -> int:
        """Tokens from `first` on that will not have to be computed, as far as that can be said now."""
        ...

    def admitted(self, sequence: Sequence) -> Blended | None:
        """It has its blocks, and `computed` leading tokens are known; what to place behind them, None for nothing.

        Called again when it was preempted. Not asked where all but the last token is known.
        """
        ...

    def released(self, sequence: Sequence) -> None:
        """Its blocks are gone: it ended, or was preempted and comes again, or was not taken into the queue."""
        ...

    def prefilled(self, sequence: Sequence, pool: KvPool, slots: Tensor) -> None:
        """Its prompt is in the pool, at these slots, int64 [N]; on the worker's thread, before the first token is told.

        Once for every admission that computes some of the prompt.
        """
        ...

    def scored(self, sequence: Sequence, scores: Tensor) -> None:
        """Its first token is about to be drawn from these, [V], which will be written to; on the worker's thread."""
        ...

    @property
    def used(self) -> Used:
        """What chunks did for it. After `prefilled`."""
        ...


class State(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and answer as one row of tokens, and where their keys and values lie.

    Owned by the scheduler between `add` and `finish`; nobody else writes `state`, `computed`, `table` or `hashes`.
    """

    prompt: list[int]
    params: SamplingParams
    tenant: str = ""
    """Whose request this is, for fairness."""
    salt: str = ""
    """Goes into the block hashes together with `tenant`: sequences that differ in either never share blocks."""
    parent: Sequence | None = None
    """Another answer to the same prompt: its blocks are shared, copied when written to."""
    fresh: bool = False
    """Compute the whole prompt although parts are known: its log probabilities were asked for."""
    reuse: Reuse | None = None
    """Its chunks. What is computed with them is not exact, hence such a sequence has a `salt`."""
    arrived: float = 0.0
    """Seconds on the scheduler's clock."""

    state: State = field(default=State.WAITING, init=False)
    tokens: list[int] = field(init=False)
    """Prompt and what was drawn so far."""
    computed: int = field(default=0, init=False)
    """Leading tokens whose keys and values are in the pool; of those `kept` they may be on their way there."""
    table: list[int] = field(default_factory=list, init=False)
    """Block of tokens i·size to (i+1)·size."""
    hashes: list[bytes] = field(default_factory=list, init=False)
    """Chained hashes of the leading full blocks, as far as they were needed."""
    cached: int = field(default=0, init=False)
    """Prompt tokens that did not have to be computed when it first ran."""
    preemptions: int = field(default=0, init=False)
    committed: int = field(default=0, init=False)
    """Leading blocks whose hashes are registered, by this sequence or others."""
    order: int = field(default=0, init=False)
    """Place in the order of arrival."""
    blended: Blended | None = field(default=None, init=False)
    """What is placed in its blocks and how it is repaired; since its admission."""
    kept: Positions | None = field(default=None, init=False)
    """Prompt tokens, not the last, whose keys and values are placed and not computed by the prefill."""
    missed: NDArray[np.float32] | None = field(default=None, init=False)
    """By place in the prompt, what it costs that a kept token is not computed, as far as its selector said; from
    the first such piece of prefill to the first repair."""
    repairs: NDArray[np.int64] | None = field(default=None, init=False)
    """Those of them that are still to be computed beside the tokens drawn, in this order; None before the first."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    def strip(self) -> None:
        """Forget what was placed: it is lost, or its blocks are."""
        self.blended = self.kept = self.missed = self.repairs = None

    @property
    def drawn(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.prompt)
