"""The judge: similarity proposes, the judge decides whether a stored answer serves a new question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Accepted:
    """The candidate's answer serves the new question."""

    candidate: Candidate
    score: float


@dataclass(frozen=True, slots=True)
class Refused:
    """No candidate's answer may be served; `score` is that of the best one."""

    reason: Miss
    score: float


Judgement = Accepted | Refused


class Judge(Protocol):
    """Decides about candidates of one scope."""

    def floor(self, policy: CategoryPolicy) -> float:
        """Return the similarity below which a candidate need not be shown to the judge."""
        ...

    def judge(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """Decide; candidates come most similar first and may be empty."""
        ...


class ThresholdJudge:
    """Accepts the most similar candidate from the category's threshold on."""

    def floor(self, policy: CategoryPolicy) -> float:
        """Return the threshold itself: nothing below it can be accepted."""
        return policy.threshold

    def judge(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """Compare the best similarity with the threshold; the score is the similarity."""
        if not candidates:
            return Refused(Miss.NO_NEIGHBOUR, -1.0)
        best = candidates[0]
        if best.similarity < policy.threshold:
            return Refused(Miss.BELOW_THRESHOLD, best.similarity)
        return Accepted(best, best.similarity)
