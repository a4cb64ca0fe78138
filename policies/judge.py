"""The judge: similarity proposes, the judge decides whether a stored answer serves a new question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from policies.category import CategoryPolicy
from policies.reasons import Miss


@dataclass(frozen=True, slots=True)
class Candidate:
    """A stored question in the same scope."""

    id: int
    text: str
    similarity: float
    """Cosine to the new question."""


class Stage(StrEnum):
    """What decided about a candidate."""

    SIMILARITY = "similarity"
    SAME = "same"
    """Equal but for how it is typed."""
    GUARD = "guard"
    PAIR = "pair"
    """The learned pair model."""
    DECLINED = "declined"
    """Not judged: too long, or no text that can be read."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge made of one candidate, for those who ask why."""

    candidate: Candidate
    stage: Stage
    accepted: bool
    probability: float | None = None
    """That the stored answer serves; None where nothing estimates it."""
    guard: str = ""
    """Name of the guard that refused, and what it found."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The candidate's answer serves the new question."""

    candidate: Candidate
    score: float
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """No candidate's answer may be served; `score` is that of the best one."""

    reason: Miss
    score: float
    verdicts: tuple[Verdict, ...] = ()


Judgement = Accepted | Refused


class Judge(Protocol):
    """Decides about candidates of one scope."""

    def floor(self, policy: CategoryPolicy) -> float:
        """Return the similarity below which a candidate need not be shown to the judge."""
        ...

    def point(self, policy: CategoryPolicy) -> float:
        """Return the score from which a candidate is accepted."""
        ...

    async def judge(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """Decide; candidates come most similar first and may be empty."""
        ...

    async def close(self) -> None:
        """Let go of what was opened."""
        ...


class ThresholdJudge:
    """Accepts the most similar candidate from the category's threshold on."""

    def floor(self, policy: CategoryPolicy) -> float:
        """Return the threshold, less what load may take from it: nothing below can be accepted."""
        return policy.threshold - policy.max_relax

    def point(self, policy: CategoryPolicy) -> float:
        """Return the threshold: the score is the similarity."""
        return policy.threshold

    async def judge(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """Compare the best similarity with the threshold."""
        if not candidates:
            return Refused(Miss.NO_NEIGHBOUR, -1.0)
        best = candidates[0]
        accepted = best.similarity >= policy.threshold
        verdicts = (Verdict(best, Stage.SIMILARITY, accepted),)
        if not accepted:
            return Refused(Miss.BELOW_THRESHOLD, best.similarity, verdicts)
        return Accepted(best, best.similarity, verdicts)

    async def close(self) -> None:
        """Nothing is open."""
