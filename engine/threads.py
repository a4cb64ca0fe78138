"""How many threads compute a step, and how they wait for each other.

Between the parallel loops of a step threads wait for tens of microseconds. Sleeping costs more than that: a prompt of
3,100 tokens takes 280 ms on two cores when they sleep and 195 when they spin. But where another process wants one of
the cores, a thread spins while the one it waits for stands in line, and the same prompt takes 640. So they spin for a
moment, and as long as they stand in line there are fewer of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

_SPINS = 30_000
"""Turns of the waiting loop of GNU's OpenMP, which the Linux wheels of torch have: a millisecond or two at most. With a
third of them threads slept between loops, and woke up on one core for all after a second without work."""
_WINDOW = 0.25
"""Seconds of steps over which it is judged whether cores are wanted by others: one step may meet a moment of theirs."""
_CROWDED = 0.1
"""Share of that which the thread stood in line for a core, from which on one thread fewer computes."""
_ROOM = 0.15
"""Share of the cores' time that nobody used, from which on standing in line was not for want of cores: after a second
without work, threads of one step may wake up on the same one, while the other is still asleep."""
_PAUSES = (0.25, 60.0)
"""Seconds until one more is tried again: twice as many each time that this was too many."""


def before_torch() -> None:
    """Say how its threads wait; it is read when torch is imported."""
    # Other kinds of OpenMP spin much longer unless they are told not to at all.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def delayed() -> float:
    """Seconds that the calling thread has stood in line for a core so far; nothing where the kernel does not tell."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    return 0.0


def idle() -> float:
    """Seconds that a core of this machine was idle so far, on average; nothing where not all are ours."""
    with suppress(OSError, AttributeError, IndexError, ValueError):
        if len(os.sched_getaffinity(0)) == (cores := os.cpu_count()):
            return float(Path("/proc/uptime").read_bytes().split()[1]) / cores
    return 0.0


class Threads:
    """Of the one thread that computes; what it starts beside itself is OpenMP's."""

    def __init__(
        self,
        most: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        delay: Callable[[], float] = delayed,
        unused: Callable[[], float] = idle,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`apart` surrounds every step that several compute: see `cachestore.kv.threads.helpers_apart`."""
        self._most, self._clock, self._delay, self._unused, self._apart = most, clock, delay, unused, apart
        self._now, self._crowded = most, most
        """How many compute, and the last number that was too many."""
        self._again, self._pause = 0.0, _PAUSES[0]
        self._stood = self._idle = self._passed = 0.0
        """Of the current window: seconds in line, those in which a core was idle, and all."""

    @contextmanager
    def step(self) -> Iterator[int]:
        """Around a step that is worth sharing: by how many threads it is to be computed."""
        began, before, unused = self._clock(), self._delay(), self._unused()
        if self._now < self._most and began >= self._again:
            self._change(self._now + 1, began)
        with self._apart() if self._now > 1 else nullcontext():
            yield self._now
        ended = self._clock()
        self._stood += self._delay() - before
        self._idle += self._unused() - unused
        self._passed += ended - began
        room = self._idle > _ROOM * self._passed
        if self._now > 1 and not room and self._stood > _CROWDED * max(self._passed, _WINDOW):
            self._crowded = self._now
            self._change(self._now - 1, ended)
            self._pause = min(2 * self._pause, _PAUSES[1])
        elif self._passed >= _WINDOW:
            if self._now >= self._crowded:
                self._pause = _PAUSES[0]
            self._stood = self._idle = self._passed = 0.0

    def _change(self, threads: int, now: float) -> None:
        self._now, self._again = threads, now + self._pause
        self._stood = self._idle = self._passed = 0.0
