"""Divergences are heavy-tailed: geometric means, compared prompt by prompt, with intervals from resampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_FLOOR = 1e-9
"""Below this two distributions are the same; the logarithm needs some floor."""


@dataclass(frozen=True, slots=True)
class Relative:
    """A geometric mean of ratios and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"


def divergence(exact: Tensor, other: Tensor) -> float:
    """KL(exact ‖ other) in nats, mean over the rows of logits [T, V]."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(float((p.exp() * (p - q)).sum(-1).mean()), _FLOOR)


def relative(values: NDArray[np.float64], base: NDArray[np.float64], *, draws: int = 2000, seed: int = 0) -> Relative:
    """Geometric mean of values over base, prompt by prompt, with a bootstrap interval over the prompts."""
    logs = np.log(values) - np.log(base)
    picked = np.random.default_rng(seed).integers(len(logs), size=(draws, len(logs)))
    low, high = np.quantile(logs[picked].mean(1), (0.025, 0.975))
    return Relative(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)))
