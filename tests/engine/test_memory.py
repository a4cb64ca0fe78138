"""Threads share what they free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_COUNT = """
import ctypes, os, threading
from engine.memory import share_freed
if {told}:
    share_freed()
barrier = threading.Barrier(12)
def allocate():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    barrier.wait()
    held = [libc.malloc(100_000) for _ in range(50)]
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


def arenas(*, told: bool, **environment: str) -> int:
    command = [sys.executable, "-c", _COUNT.format(told=told)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_threads_share_two_arenas_unless_the_user_says_otherwise() -> None:
    assert arenas(told=False) > 2
    assert arenas(told=True) <= 2
    assert arenas(told=True, MALLOC_ARENA_MAX="5") > 2
