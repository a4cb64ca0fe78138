"""How loaded the backends are, and what may give way for it: the acceptance point, within its budget, and the TTL.

One number, lambda in [0, 1]: the worst of a pool's queue, its latency against the objective, and the share of calls it
refused with 429. It rises quickly and falls slowly, and relaxing begins at a higher load than it ends, so that the
relief that it brings does not turn it off again at once (a hysteresis, as in a thermostat).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from policies.category import CategoryPolicy


@dataclass(frozen=True, slots=True)
class LoadRules:
    """When a pool counts as loaded."""

    queue_free: float = 0.5
    """Calls in flight per slot of the pool up to which the queue is no load."""
    queue_full: float = 1.5
    """Calls in flight per slot from which on it is full load."""
    objective: float = 10.0
    """Seconds that a call should take at most: no load below, full load at `late` times as much."""
    late: float = 2.0
    refused_full: float = 0.1
    """Share of 429 answers that is full load."""
    rise: float = 2.0
    """Seconds in which the load covers 63 % of the way up."""
    fall: float = 20.0
    """The same, on the way down."""
    engage: float = 0.5
    """Relaxing begins at this load,"""
    release: float = 0.25
    """and ends below this one."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.release < self.engage <= 1.0):
            raise ValueError(f"0 <= release < engage <= 1 does not hold: {self.release}, {self.engage}")
        if not (self.queue_free < self.queue_full and self.objective > 0 and self.late > 1 and self.refused_full > 0):
            raise ValueError("queue_free < queue_full, objective > 0, late > 1 and refused_full > 0 must hold")
        if self.rise <= 0 or self.fall <= 0:
            raise ValueError("rise and fall must be positive")


@dataclass(frozen=True, slots=True)
class Signals:
    """What is seen of a pool at one moment."""

    in_flight: int
    slots: int
    """How many calls the pool runs at once without slowing down."""
    latency: float | None = None
    """Recent seconds of a call (an upper quantile or a mean); None while unknown."""
    refused: float = 0.0
    """Recent share of calls answered 429."""


_NEWEST = 0.1
"""Weight of the newest call in what is recent."""


@dataclass(slots=True)
class Recent:
    """What the last calls to a backend were like; times in seconds of a clock that does not jump."""

    latency: float | None = None
    refused: float = 0.0
    at: float = -math.inf

    def note(self, seconds: float, *, refused: bool, now: float) -> None:
        """Take in one call that has ended; one that was refused says nothing about latency."""
        self.at = now
        self.refused += _NEWEST * (refused - self.refused)
        if not refused:
            self.latency = seconds if self.latency is None else self.latency + _NEWEST * (seconds - self.latency)


def pressure(signals: Signals, rules: LoadRules) -> float:
    """The load of one moment, in [0, 1]."""
    queue = (signals.in_flight / max(1, signals.slots) - rules.queue_free) / (rules.queue_full - rules.queue_free)
    late = 0.0 if signals.latency is None else (signals.latency / rules.objective - 1.0) / (rules.late - 1.0)
    return min(1.0, max(0.0, queue, late, signals.refused / rules.refused_full))


@dataclass(frozen=True, slots=True)
class Load:
    """A pool's load at a time; a value, replaced by `after`."""

    level: float = 0.0
    engaged: bool = False
    at: float = -math.inf

    @property
    def relief(self) -> float:
        """How far to relax, in [0, 1]: the level while engaged, else 0."""
        return self.level if self.engaged else 0.0

    def after(self, now: float, signals: Signals, rules: LoadRules) -> Load:
        """The load after one more look at the pool; `now` in seconds. A clock that goes back stands still."""
        target = pressure(signals, rules)
        elapsed = max(0.0, now - self.at)
        constant = rules.rise if target > self.level else rules.fall
        level = self.level + (target - self.level) * -math.expm1(-elapsed / constant)
        engaged = level >= (rules.release if self.engaged else rules.engage)
        return Load(level, engaged, max(now, self.at))


def relaxed(wanted: float, floor: float, relief: float, max_relax: float) -> float:
    """The acceptance point under load: max(floor, wanted - max_relax * relief); a floor above `wanted` changes nothing.

    `max_relax` 0 never relaxes. What comes out is still subject to the error budget: `CategoryBudget.point` never goes
    below the point that was tested against it.
    """
    return max(min(floor, wanted), wanted - max_relax * relief)


@dataclass(frozen=True, slots=True)
class Relief:
    """What the load of a pool lets give way for one call."""

    relief: float = 0.0
    stretch: float = 0.0
    """By how much of itself a TTL grows at full load."""

    def stretched(self, policy: CategoryPolicy) -> CategoryPolicy:
        """The rules with their TTL stretched, where the category may give way at all.

        What speaks of the present is shortened after this, so that it is not stretched.
        """
        if self.relief <= 0.0 or policy.max_relax <= 0.0:
            return policy
        return replace(policy, ttl=policy.ttl * (1.0 + self.stretch * self.relief))


NO_RELIEF = Relief()
