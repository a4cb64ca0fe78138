"""Whether comparing by meaning pays, per category, measured while it runs.

A look-up by meaning costs every call of a category; a hit saves a generation and costs a fetch. It pays from the hit
rate h* = C_lookup / (T_generate - T_fetch) on (after arXiv 2510.26835). A category clearly below that skips the stage
for a number of calls, then probes it again: it skips twice as long after each probe that failed, up to a bound, and
goes back to the shortest pause after one that paid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class EconomicsRules:
    """When the semantic stage is skipped."""

    memory: int = 2000
    """Look-ups over which the means reach back."""
    evidence: int = 200
    """Look-ups before anything is judged, and the length of a probe."""
    confidence: float = 2.0
    """Standard errors by which the hit rate must lie below break-even to skip."""
    gap: float = 1.25
    """A probe must reach this multiple of break-even for the stage to stay on."""
    pause: int = 1000
    """Calls that the first pause skips."""
    longest_pause: int = 32000

    def __post_init__(self) -> None:
        if not (0 < self.evidence <= self.memory and 0 < self.pause <= self.longest_pause and self.gap >= 1.0):
            raise ValueError("economics needs 0 < evidence <= memory, 0 < pause <= longest_pause and gap >= 1")


class Stage(StrEnum):
    """What a category's semantic stage does; a metric label."""

    ON = "on"
    SKIPPED = "skipped"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Balance:
    """A category's figures, times in seconds."""

    stage: Stage
    lookups: int
    hit_rate: float | None
    break_even: float | None
    """None while unknown; infinite when a generation is no slower than a fetch."""
    lookup: float | None
    generate: float | None
    fetch: float | None
    saved_seconds: float
    """Generation time saved less the cost of all look-ups; negative while the stage does not pay."""
    saved_price: float


@dataclass(slots=True)
class _Mean:
    """A mean that forgets: plain until `memory` values, exponential after."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float, memory: int) -> None:
        self.count = min(memory, self.count + 1)
        self.value += (value - self.value) / self.count

    @property
    def known(self) -> float | None:
        return self.value if self.count else None


class CategoryEconomics:
    """One category's balance: a dozen numbers."""

    def __init__(self, rules: EconomicsRules) -> None:
        self._rules = rules
        self._lookup = _Mean()
        self._generate = _Mean()
        self._fetch = _Mean()
        self._hits = _Mean()
        self._probe = _Mean()
        self._stage = Stage.ON
        self._pause = rules.pause
        self._left = 0
        self._lookups = 0
        self._saved_seconds = 0.0
        self._saved_price = 0.0

    @property
    def break_even(self) -> float | None:
        """The hit rate from which on the stage pays; None while one of its parts is unknown."""
        return break_even(self._lookup.known, self._generate.known, self._fetch.known or 0.0)

    def allows(self) -> bool:
        """Whether the next call may be compared by meaning; counts it as skipped if not."""
        if self._stage is not Stage.SKIPPED:
            return True
        self._left -= 1
        if self._left <= 0:
            self._stage = Stage.PROBING
            self._probe = _Mean()
        return False

    def looked(self, seconds: float, *, hit: bool) -> None:
        """A look-up by meaning took `seconds` beyond the exact stage: embedding, search, judge."""
        self._lookups += 1
        self._saved_seconds -= seconds
        self._lookup.add(seconds, self._rules.memory)
        self._hits.add(float(hit), self._rules.memory)
        if self._stage is Stage.PROBING:
            self._probe.add(float(hit), self._rules.evidence)
        self._judge()

    def generated(self, seconds: float) -> None:
        """A miss took `seconds` at the backend."""
        self._generate.add(seconds, self._rules.memory)

    def fetched(self, seconds: float, *, cost: float, price: float = 0.0) -> None:
        """A hit took `seconds` to fetch, and saved `cost` seconds of generation and `price` of money."""
        self._fetch.add(seconds, self._rules.memory)
        self._saved_seconds += cost - seconds
        self._saved_price += price

    def balance(self) -> Balance:
        """The figures for `cache stats` and the metrics."""
        return Balance(
            self._stage,
            self._lookups,
            self._hits.known,
            self.break_even,
            self._lookup.known,
            self._generate.known,
            self._fetch.known,
            self._saved_seconds,
            self._saved_price,
        )

    def plain(self) -> dict[str, Any]:
        """The state as JSON's own types."""
        means = (self._lookup, self._generate, self._fetch, self._hits, self._probe)
        return {
            "means": [[mean.value, mean.count] for mean in means],
            "stage": str(self._stage),
            "pause": self._pause,
            "left": self._left,
            "lookups": self._lookups,
            "saved": [self._saved_seconds, self._saved_price],
        }

    @classmethod
    def restored(cls, rules: EconomicsRules, plain: Mapping[str, Any]) -> CategoryEconomics:
        """Take a state up again. Raises ValueError when it is not one."""
        try:
            found = cls(rules)
            means = [_Mean(float(value), min(int(count), rules.memory)) for value, count in plain["means"]]
            found._lookup, found._generate, found._fetch, found._hits, found._probe = means
            found._stage = Stage(plain["stage"])
            found._pause = min(int(plain["pause"]), rules.longest_pause)
            found._left, found._lookups = int(plain["left"]), int(plain["lookups"])
            found._saved_seconds, found._saved_price = map(float, plain["saved"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a category's economics: {error}") from error
        return found

    def _judge(self) -> None:
        level = self.break_even
        if level is None:
            return
        rules = self._rules
        match self._stage:
            case Stage.ON:
                if self._hits.count >= rules.evidence and _clearly_below(self._hits, level, rules.confidence):
                    self._skip()
            case Stage.PROBING:
                if self._probe.count < rules.evidence:
                    return
                if self._probe.value >= rules.gap * level:
                    self._stage = Stage.ON
                    self._pause = rules.pause
                    self._hits = _Mean(self._probe.value, self._probe.count)
                else:
                    self._pause = min(2 * self._pause, rules.longest_pause)
                    self._skip()
            case Stage.SKIPPED:
                pass  # A look-up that was under way when the stage was turned off.

    def _skip(self) -> None:
        self._stage = Stage.SKIPPED
        self._left = self._pause


def break_even(lookup: float | None, generate: float | None, fetch: float = 0.0) -> float | None:
    """h* = C_lookup / (T_generate - T_fetch), all in seconds; None if a part is unknown, infinite if no hit can pay."""
    if lookup is None or generate is None:
        return None
    saved = generate - fetch
    return lookup / saved if saved > 0 else math.inf


def _clearly_below(rate: _Mean, level: float, errors: float) -> bool:
    """Whether a hit rate lies below `level` by that many standard errors (Wilson's score, without its correction)."""
    if level >= 1.0:
        return True
    return rate.value + errors * math.sqrt(level * (1.0 - level) / rate.count) < level
