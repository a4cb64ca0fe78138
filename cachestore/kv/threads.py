"""Manners of threads that work beside another one.

After a moment without work a kernel may wake a thread on the core of the one that wakes it, where both take turns while
another core sleeps: that was 9 of the 60 ms of a prompt. So helpers are kept off the core of the one that they help.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

_NICE = 10
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
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


def _core() -> int:
    """The one that the calling thread is on; none where the system does not tell."""
    with suppress(AttributeError):
        return int(_LIBC.sched_getcpu())
    return -1


def keep_apart(helpers: Iterable[int]) -> None:
    """From now on these threads, by their native ids, use all cores but the one that the calling one is on.

    Does nothing where there is one core only, or where the system does not let threads choose.
    """
    with suppress(OSError, AttributeError):
        allowed = os.sched_getaffinity(0)
        elsewhere = allowed - {_core()}
        for helper in helpers if elsewhere else ():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(helper, elsewhere)


@contextmanager
def helpers_apart() -> Iterator[None]:
    """While this lasts the calling thread stays on its core, and those that OpenMP started for it on the others.

    Those are the threads of this process that Python does not know; others among them lose no more than this core.
    """
    before: set[int] = set()
    with suppress(OSError, AttributeError):
        known = {thread.native_id for thread in threading.enumerate()}
        if helpers := {int(task.name) for task in Path("/proc/self/task").iterdir()} - known:
            keep_apart(helpers)
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {_core()} & before or before)
    try:
        yield
    finally:
        if before:
            with suppress(OSError):  # cores that were taken away meanwhile
                os.sched_setaffinity(0, before)


class Workers(ThreadPoolExecutor):
    """A pool whose threads wake on another core than the one that has work for them, and goes on with its own."""

    def __init__(self, count: int, name: str, begin: Callable[[], None] = lambda: None) -> None:
        """`begin` is called on each of its threads first."""
        self._ids: list[int] = []
        self._apart = (-1, 0)
        """From which core, and how many of them."""

        def began() -> None:
            self._ids.append(threading.get_native_id())
            begin()

        super().__init__(count, name, initializer=began)

    def submit(self, work: Callable[_Given, _Made], /, *given: _Given.args, **named: _Given.kwargs) -> Future[_Made]:
        """See `Executor`."""
        if self._apart != (here := (_core(), len(self._ids))):
            keep_apart(self._ids)
            self._apart = here
        return super().submit(work, *given, **named)
