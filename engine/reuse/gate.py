"""The running check: reuse is switched off when it costs more than was stated, and on again when it does not.

Now and then a blended prompt is computed in full when there is time, and compared: the divergence of the first
token's distribution, and whether both find the same token most likely. From these checks follow running bounds of
what reuse costs, by betting: against "the mean is at most m" and "the mean is at least m" a capital is held for each of
a row of means m. It starts at 1, is multiplied by `1 + bet * (x - m)` or `1 + bet * (m - x)`, and never lies below 1
when a check begins; of three sizes of bets the mean counts. As long as its hypothesis holds, a capital reaches
`1 / risk` on average not before `1 / risk` checks, whenever one looks (e-detectors: Shin, Ramdas and Rinaldo, arXiv
2203.03532; bets on bounded means: Waudby-Smith and Ramdas, arXiv 2010.09686, section 4). What is assumed: every check's
expected loss, given the checks before it, keeps to the hypothesis; which is so if prompts are drawn by chance. Because
no capital sinks, years of good checks do not delay noticing that traffic has changed.

The gateway's error budgets (`policies.budget`) bet as well, but for points of acceptance with one label each, and with
a memory of their own; what could be shared is a line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RISK = 0.001
"""One false switching in so many checks, on average, at the most."""
_WORST = 20.0
"""A divergence counts as so many times the stated one at the most: a bet needs a bound. A mean that is above the stated
one all the same is above it; one that is below it might not be without the bound."""
_BETS = np.array([0.05, 0.25, 0.8])[:, None]
"""Shares of the largest bet that cannot lose everything."""
_STEPS = np.geomspace(1 / 16, 16, 33)
"""The means that are bet on, relative to the stated one."""
_STATED = 16
_LEAST = 1e-6
_ROOM = 0.5


@dataclass(frozen=True, slots=True)
class Bounds:
    """What checks say about a mean, since the last switching."""

    mean: float
    low: float
    """It is above this; 0 while nothing is known."""
    high: float
    """It is below this; infinite while nothing is known."""


@dataclass(frozen=True, slots=True)
class GateFigures:
    """For logs and metrics."""

    open: bool
    checks: int
    """Of all time."""
    kl: Bounds
    disagreement: Bounds
    closings: int


class Gate:
    """Whether chunks are reused. Not locked: who observes is one thread, `open` may be read by any."""

    def __init__(self, most_kl: float, least_agreement: float, *, risk: float = _RISK) -> None:
        """`most_kl`: nats, the stated mean divergence; `least_agreement`: the stated share of equal tokens.

        Raises ValueError where there is nothing to keep: both bounds must be proper ones.
        """
        if not (0.0 < most_kl < math.inf and 0.0 < least_agreement <= 1.0 and 0.0 < risk < 1.0):
            raise ValueError("a gate needs most_kl above 0, least_agreement in (0, 1] and risk in (0, 1)")
        self._most_kl, self._most_disagreement = most_kl, max(_LEAST, 1.0 - least_agreement)
        self._enter = math.log(2 / risk)  # two means are watched
        self._open, self._checks, self._closings = True, 0, 0
        self._start()

    @property
    def open(self) -> bool:
        """Whether chunks are reused. Checks go on either way."""
        return self._open

    @property
    def closings(self) -> int:
        """How often reuse was switched off."""
        return self._closings

    def observe(self, kl: float, agrees: bool) -> bool:
        """Take a check: nats, and whether both choose the same token. True: `open` has changed.

        Raises ValueError for what is no divergence.
        """
        if not kl >= 0.0:
            raise ValueError(f"{kl!r} is not a divergence")
        self._checks += 1
        self._kl.observe(kl)
        self._disagreement.observe(0.0 if agrees else 1.0)
        changes = any(self._above()) if self._open else all(self._within())
        if changes:
            self._open = not self._open
            self._closings += not self._open
            self._start()
        return changes

    def figures(self) -> GateFigures:
        """What there is to see."""
        return GateFigures(self._open, self._checks, self._kl.bounds(), self._disagreement.bounds(), self._closings)

    def _start(self) -> None:
        """What was known led to the present state, and is used up by that."""
        self._kl = _Bet(self._most_kl, _WORST * self._most_kl, self._enter)
        self._disagreement = _Bet(self._most_disagreement, 1.0, self._enter)

    def _above(self) -> tuple[bool, bool]:
        return self._kl.above, self._disagreement.above

    def _within(self) -> tuple[bool, bool]:
        return self._kl.within, self._disagreement.within


class _Bet:
    """Capitals against the means in `_STEPS` of values from 0 to `worst`."""

    def __init__(self, stated: float, worst: float, enter: float) -> None:
        self._worst, self._enter = worst, enter
        self._means = np.minimum(stated / worst * _STEPS, 1 - _LEAST)
        self._over = np.zeros((len(_BETS), len(self._means)))
        self._under = np.zeros_like(self._over)
        self._sum, self._count = 0.0, 0

    def observe(self, value: float) -> None:
        self._sum += value
        self._count += 1
        x, means = min(1.0, value / self._worst), self._means
        # Little is kept above what decides, so that bounds can withdraw.
        most = self._enter + math.log(len(_BETS)) + _ROOM
        self._over = np.clip(self._over, 0, most) + np.log1p(_BETS * (x - means) / means)
        self._under = np.clip(self._under, 0, most) + np.log1p(_BETS * (means - x) / (1 - means))

    @property
    def above(self) -> bool:
        """The mean is above the stated one."""
        return bool(self._refuted(self._over)[_STATED])

    @property
    def within(self) -> bool:
        """The mean is below the stated one."""
        return bool(self._refuted(self._under)[_STATED])

    def bounds(self) -> Bounds:
        over, under = self._refuted(self._over), self._refuted(self._under)
        low = float(self._means[over].max(initial=0.0)) * self._worst
        high = float(self._means[under].min(initial=math.inf)) * self._worst
        return Bounds(self._sum / self._count if self._count else 0.0, low, high)

    def _refuted(self, capital: NDArray[np.float64]) -> NDArray[np.bool_]:
        refuted: NDArray[np.bool_] = np.logaddexp.reduce(capital, axis=0) - math.log(len(_BETS)) >= self._enter
        return refuted
