"""Manners of threads that work beside another one.

After a moment without work a kernel may wake a thread on the core of the one that wakes it, where both take turns while
another core sleeps: that was 9 of the 60 ms of a prompt. So helpers are kept off the core of the one that they help.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

_NICE = 10
_LIBC = ctypes.CDLL(None)


def alone() -> None:
    """This thread computes by itself: helpers would take the cores of whoever computes answers."""
    # A thread's first parallel loop takes over the number that anybody set last; asking does so now, before it is ours.
    torch.get_num_threads()
    torch.set_num_threads(1)


def step_back() -> None:
    """Alone, and let whoever answers go first."""
    alone()
    with suppress(AttributeError, OSError):  # where threads have no priority of their own, all keep theirs
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def keep_apart(helpers: Iterable[int]) -> None:
    """From now on these threads, by their native ids, use all cores but the one that the calling one is on.

    Does nothing where there is one core only, or where the system does not let threads choose.
    """
    with suppress(OSError, AttributeError):
        allowed = os.sched_getaffinity(0)
        elsewhere = allowed - {_LIBC.sched_getcpu()}
        for helper in helpers if elsewhere else ():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(helper, elsewhere)


def keep_helpers_apart() -> None:
    """The same for those that OpenMP started: the threads of this process that Python does not know.

    Others that it does not know lose no more than one core.
    """
    with suppress(OSError):
        known = {thread.native_id for thread in threading.enumerate()}
        keep_apart({int(task.name) for task in Path("/proc/self/task").iterdir()} - known)


class Workers(ThreadPoolExecutor):
    """A pool whose threads wake on another core than the one that has work for them."""

    def __init__(self, count: int, name: str, begin: Callable[[], None] = lambda: None) -> None:
        """`begin` is called on each of its threads first."""
        self._ids: list[int] = []

        def began() -> None:
            self._ids.append(threading.get_native_id())
            begin()

        super().__init__(count, name, initializer=began)

    def apart(self) -> None:
        """Whoever submits work next goes on with work of its own meanwhile."""
        keep_apart(self._ids)
