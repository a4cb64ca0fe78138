"""What to load, as what, and how much to compute: decided from rates that were measured, not set. No I/O, no clock.

Two rules from the literature, over one running estimate:

- CacheGen (arXiv 2310.07240, section 5.3): of the ways to have a chunk, take the one that is ready first; computing it
  from its text is one of them, and wins where a tier is slow or a chunk short.
- CacheBlend (arXiv 2405.16444, section 5): recomputing a share r of the tokens takes r · T_prefill. While loading takes
  longer than that, recomputing more costs nothing; so r grows until the one hides the other, and never falls below the
  share that quality asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachestore.kv.shelf import Tier


class Rate:
    """A running estimate of seconds = delay + amount / speed, from transfers of different sizes.

    Older observations count less, by half after `half` newer ones. The line is fitted by least squares; where all
    amounts were about the same it cannot be told apart from a plain ratio, and the ratio is what is used.
    """

    def __init__(self, speed: float, delay: float = 0.0, *, half: float = 16.0) -> None:
        """`speed` in amounts a second and `delay` in seconds are believed until something was observed."""
        if speed <= 0 or delay < 0 or half <= 0:
            raise ValueError(f"no rate has a speed of {speed} and a delay of {delay}")
        self._speed, self._delay = speed, delay
        self._fade = 0.5 ** (1.0 / half)
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """Something of this amount took so long. What took no time or had no amount says nothing."""
        if amount <= 0 or seconds <= 0:
            return
        fade = self._fade
        self._weight = self._weight * fade + 1.0
        self._x = self._x * fade + amount
        self._y = self._y * fade + seconds
        self._xx = self._xx * fade + amount * amount
        self._xy = self._xy * fade + amount * seconds
        self._fit()

    def seconds(self, amount: float) -> float:
        """How long so much would take."""
        return self._delay + amount / self._speed if amount > 0 else 0.0

    @property
    def speed(self) -> float:
        """Amounts a second, delay aside."""
        return self._speed

    def _fit(self) -> None:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = mean_y / mean_x
        if spread > (0.1 * mean_x) ** 2:
            slope = (self._xy / self._weight - mean_x * mean_y) / spread
        # Noise may fit a line that falls, or begins below nothing; neither is how machines are.
        slope = min(max(slope, 1e-3 * mean_y / mean_x), mean_y / mean_x)
        self._speed, self._delay = 1.0 / slope, max(0.0, mean_y - slope * mean_x)


@dataclass(frozen=True, slots=True)
class Source:
    """One way to have a chunk without computing it."""

    tier: Tier
    codec: str
    size: int
    """Bytes to read."""
    plain: int
    """Bytes they become."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """This chunk is to be read, and repaired."""

    source: Source
    seconds: float
    """How long reading and decoding it takes."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """This chunk is to be computed from its text."""

    seconds: float


Choice = Loaded | Recomputed


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with the chunks of one request."""

    choices: tuple[Choice, ...]
    ratio: float
    """Share of the loaded tokens to recompute."""
    loading: float
    """Seconds to read and decode all that is loaded …"""
    computing: float
    """… and to compute everything else meanwhile."""

    @property
    def loaded(self) -> frozenset[int]:
        """Which chunks are to be read."""
        return frozenset(index for index, choice in enumerate(self.choices) if isinstance(choice, Loaded))

    @property
    def seconds(self) -> float:
        """Until the last layer is done: layer by layer, the slower of the two hides the other."""
        return max(self.loading, self.computing)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One chunk of a request."""

    tokens: int
    sources: Sequence[Source]
    """Where it is stored; empty: nowhere."""


class Controller:
    """The running estimates, and the plan that follows from them. One thread owns it."""

    def __init__(
        self, *, prefill: float = 1_000.0, reading: float = 1e9, decoding: float = 1e9, apart: bool = True
    ) -> None:
        """First guesses: tokens computed, bytes read and decoded a second. The first observations replace them.

        `apart`: who decodes does not take the cores of who computes, so that computing is free meanwhile.
        """
        self._apart = apart
        self._guess = {"read": reading, "decode": decoding}
        self._prefill = Rate(prefill)
        self._reading: dict[Tier, Rate] = {}
        self._decoding: dict[str, Rate] = {}

    def computed(self, tokens: int, seconds: float) -> None:
        """So many tokens were computed in so many seconds."""
        self._prefill.observe(tokens, seconds)

    def transferred(self, source: Source, reading: float, decoding: float) -> None:
        """This was read and decoded in so many seconds each."""
        self._tier(source.tier).observe(source.size, reading)
        self._codec(source.codec).observe(source.plain, decoding)

    def loading(self, source: Source) -> float:
        """Seconds that this one takes."""
        return self._tier(source.tier).seconds(source.size) + self._codec(source.codec).seconds(source.plain)

    def plan(self, wanted: Sequence[Wanted], *, rest: int = 0, least: float = 0.15) -> Plan:
        """Decide for the chunks of one request.

        `rest`: tokens that are computed in any case, the question among them. `least`: the share of loaded tokens that
        must be recomputed for the answer to be good enough. A chunk is loaded where that is ready sooner than computing
        it; the repair that loading brings with it is counted on its side.
        """
        if not 0.0 <= least <= 1.0:
            raise ValueError(f"least: {least} is no share")
        choices = tuple(self._choose(one, least) for one in wanted)
        loaded = sum(one.tokens for one, choice in zip(wanted, choices, strict=True) if isinstance(choice, Loaded))
        computed = rest + sum(one.tokens for one in wanted) - loaded
        loading = sum(choice.seconds for choice in choices if isinstance(choice, Loaded))
        waiting = loading if self._apart else sum(map(self._reading_of, choices))
        ratio = self._ratio(loaded, waiting, self._prefill.seconds(computed), least)
        return Plan(choices, ratio, loading, self._prefill.seconds(computed + ratio * loaded))

    def _choose(self, wanted: Wanted, least: float) -> Choice:
        computing = self._prefill.seconds(wanted.tokens)
        if wanted.sources:
            best = min(wanted.sources, key=self.loading)
            seconds = self.loading(best)
            # Repair and loading run side by side, so the chunk is ready when the slower of both is.
            if max(seconds, self._prefill.seconds(math.ceil(least * wanted.tokens))) < computing:
                return Loaded(best, seconds)
        return Recomputed(computing)

    def _reading_of(self, choice: Choice) -> float:
        """Seconds until its bytes are there."""
        return self._tier(choice.source.tier).seconds(choice.source.size) if isinstance(choice, Loaded) else 0.0

    def _ratio(self, loaded: int, loading: float, busy: float, least: float) -> float:
        """The share of `loaded` tokens that can be computed while they are loaded, where `busy` seconds are taken."""
        if not loaded:
            return least
        free = max(0.0, loading - busy) * self._prefill.speed
        return min(1.0, max(least, free / loaded))

    def _tier(self, tier: Tier) -> Rate:
        return self._reading.setdefault(tier, Rate(self._guess["read"]))

    def _codec(self, codec: str) -> Rate:
        return self._decoding.setdefault(codec, Rate(self._guess["decode"]))


def smallest_within(loss: Mapping[str, float], size: Mapping[str, float], most: float) -> str:
    """The codec with the least bytes of those whose measured loss is at most `most`; `raw` where none is."""
    fit = [codec for codec in loss if loss[codec] <= most and codec in size]
    return min(fit, key=lambda codec: size[codec], default="raw")
