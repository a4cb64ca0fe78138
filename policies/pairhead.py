"""The last step of judging: the pair model's logit and the cosine become a probability, and a point to accept.

Calibrated over all pairs alike, probabilities are not calibrated within a category: the same .9 is right nineteen
times out of twenty about sums and four times out of five about news. So a category that had enough pairs has points of
its own.

The probability is a logistic regression. Shared words, one-sided numbers, lengths and the like were tried beside the
two and left out: they fit the mass of pairs and cost recall at few false hits. Its offset for a category is shrunk
towards none, by as much as the category had few pairs when it was fitted.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
"""`(error budget, probability)`, budgets ascending."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one regression."""

    logit: float
    cosine: float
    intercept: float


@dataclass(frozen=True, slots=True)
class PairHead:
    """Two regressions: of an embedder it was not fitted for, it takes no cosine."""

    with_cosine: Weights
    without_cosine: Weights
    categories: Mapping[str, float]
    """Offset of the logit by category."""
    points: Points
    """Where accepting keeps the budget on the reference pairs."""
    category_points: Mapping[str, Points]
    """The same by category, where there were pairs enough."""

    def probability(self, logit: float, cosine: float | None, category: str) -> float:
        """Probability that the stored answer serves; no cosine if it is of an embedder unknown here."""
        weights = self.without_cosine if cosine is None else self.with_cosine
        total = weights.intercept + weights.logit * logit + weights.cosine * (cosine or 0.0)
        total += self.categories.get(category, 0.0)
        return 1 / (1 + math.exp(-max(-40.0, min(40.0, total))))

    def point(self, error_budget: float, category: str) -> float:
        """Probability from which a candidate is accepted, interpolated between the measured budgets."""
        points = self.category_points.get(category, self.points)
        place = bisect_left([budget for budget, _ in points], error_budget)
        if place == 0:
            # Below the strictest measured budget only certainty is left, which no pair reaches but an equal one.
            first_budget, first = points[0]
            return 1.0 if error_budget <= 0 else 1 - (1 - first) * error_budget / first_budget
        if place == len(points):
            return points[-1][1]
        (low, above), (high, below) = points[place - 1], points[place]
        return above + (below - above) * (error_budget - low) / (high - low)
