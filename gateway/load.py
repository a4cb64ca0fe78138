"""How loaded the backends are: the state of each, and what a pool's load lets give way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.upstream import Backend
from policies.load import Load, LoadRules, Signals

_FADE = 20.0
"""Seconds after which what was seen of a backend counts for 37 %: without calls there is nothing to see, and without
this a refusal would be held against it for ever."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a backend can do."""

    slots: int = 64
    """Calls that it runs at once without slowing down."""
    rules: LoadRules = field(default_factory=LoadRules)


class Loads:
    """The load of each backend, brought up to date whenever it is asked for."""

    def __init__(
        self, capacities: Mapping[str, Capacity], stretch: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`capacities` by the upstreams' names; `stretch`: by how much of itself a TTL grows at full load."""
        self.stretch = stretch
        self._capacities = capacities
        self._clock = clock
        self._loads: dict[str, Load] = {}

    def of(self, pool: Sequence[Backend]) -> Load:
        """Return the load of a pool: that of its least loaded backend, which is the one to be asked."""
        return min((self._after(backend) for backend in pool), key=lambda load: (load.relief, load.level))

    def levels(self) -> dict[str, Load]:
        """Return what was seen last, by backend."""
        return dict(self._loads)

    def _after(self, backend: Backend) -> Load:
        now, capacity = self._clock(), self._capacities.get(backend.name, Capacity())
        faded = math.exp(-max(0.0, now - backend.recent.at) / _FADE)
        latency = None if backend.recent.latency is None else backend.recent.latency * faded
        signals = Signals(backend.in_flight, capacity.slots, latency, backend.recent.refused * faded)
        load = self._loads.get(backend.name, Load(at=now)).after(now, signals, capacity.rules)
        self._loads[backend.name] = load
        return load
