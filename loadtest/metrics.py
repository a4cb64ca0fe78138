"""Figures of merit for a judge's scores, as plain functions. Undefined figures are None, never a guess."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Probability that a positive scores above a negative, ties counted half; None without both."""
    if not positives or not negatives:
        return None
    wanted, others = np.array(positives), np.sort(np.array(negatives))
    below = np.searchsorted(others, wanted, side="left")
    equal = np.searchsorted(others, wanted, side="right") - below
    return float((below + equal / 2).sum() / (len(wanted) * len(others)))


def recall_at(positives: Sequence[float], negatives: Sequence[float], false_share: float) -> float | None:
    """Share of the positives above the lowest threshold that at most this share of the negatives exceeds."""
    if not positives or not negatives:
        return None
    others = np.sort(np.array(negatives))[::-1]
    # The small number takes back what rounding did to a product like 0.07 * 100.
    allowed = int(false_share * len(others) + 1e-9)
    if allowed >= len(others):
        return 1.0
    return float((np.array(positives) > others[allowed]).mean())


def share(flags: Sequence[bool]) -> float | None:
    """Share of true flags; None of none."""
    return sum(flags) / len(flags) if flags else None


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds; None of nothing."""
    if not seconds:
        return None
    values: NDArray[np.float64] = np.percentile(np.array(seconds), [50, 90, 99]) * 1000
    return {name: round(float(value), 3) for name, value in zip(("p50", "p90", "p99"), values, strict=True)}


def reliability(
    shares: NDArray[np.float64], labels: NDArray[np.float64], bins: int = 10
) -> list[tuple[int, float, float]]:
    """Pairs, mean probability and share that serve, by tenths of the probability."""
    place = np.minimum((shares * bins).astype(int), bins - 1)
    return [
        (int((place == part).sum()), float(shares[place == part].mean()), float(labels[place == part].mean()))
        for part in range(bins)
        if (place == part).any()
    ]
