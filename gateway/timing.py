"""How long each room took: the `Server-Timing` of one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timing:
    """Seconds by room, in the order in which the rooms were left."""

    __slots__ = ("_rooms",)

    def __init__(self) -> None:
        self._rooms: list[tuple[str, float]] = []

    def add(self, room: str, seconds: float) -> None:
        """Record a room that was timed outside."""
        self._rooms.append((room, seconds))

    @contextmanager
    def room(self, name: str) -> Iterator[None]:
        """Time a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def header(self) -> bytes:
        """Return the header's value, durations in milliseconds."""
        return ", ".join(f"{name};dur={seconds * 1000:.3g}" for name, seconds in self._rooms).encode()
