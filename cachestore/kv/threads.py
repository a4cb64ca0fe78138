"""Manners of threads that work beside the one that computes answers."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import torch

_NICE = 10


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
