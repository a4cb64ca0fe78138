"""One answer in the making, as scheduler, blocks and runner see it. Plain state, no tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.sampling import SamplingParams


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
    arrived: float = 0.0
    """Seconds on the scheduler's clock."""

    state: State = field(default=State.WAITING, init=False)
    tokens: list[int] = field(init=False)
    """Prompt and what was drawn so far."""
    computed: int = field(default=0, init=False)
    """Leading tokens whose keys and values are in the pool."""
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

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def drawn(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.prompt)
