"""Threads that work beside another one, on another core."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from cachestore.kv.threads import Workers

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs a second core"
)


def test_workers_leave_the_core_of_whoever_has_work_for_them() -> None:
    before = os.sched_getaffinity(0)
    began: list[str] = []
    with Workers(2, "beside", lambda: began.append(threading.current_thread().name)) as workers:
        assert workers.submit(os.sched_getaffinity, 0).result() == before
        for _ in range(20):
            allowed = workers.submit(os.sched_getaffinity, 0).result()
            assert allowed < before
            assert len(allowed) == len(before) - 1
    assert began[0].startswith("beside")
    assert os.sched_getaffinity(0) == before


def test_whoever_has_one_core_only_shares_it() -> None:
    mine = os.sched_getaffinity(0)
    with Workers(1, "beside") as workers:
        os.sched_setaffinity(0, {min(mine)})
        try:
            before = workers.submit(os.sched_getaffinity, 0).result()
            assert workers.submit(os.sched_getaffinity, 0).result() == before
        finally:
            os.sched_setaffinity(0, mine)


def test_those_that_openmp_starts_help_on_other_cores() -> None:
    program = (
        "from engine.threads import before_torch\n"
        "before_torch()\n"
        "import os, threading, torch\n"
        "from cachestore.kv.threads import helpers_apart\n"
        "known = {int(name) for name in os.listdir('/proc/self/task')}\n"
        "before = os.sched_getaffinity(0)\n"
        "torch.set_num_threads(2)\n"
        "torch.zeros(2**22).add_(1)\n"
        "helpers = {int(name) for name in os.listdir('/proc/self/task')} - known\n"
        "with helpers_apart():\n"
        "    mine = os.sched_getaffinity(0)\n"
        "    assert len(mine) == 1\n"
        "    assert helpers and all(os.sched_getaffinity(one) == before - mine for one in helpers)\n"
        "assert os.sched_getaffinity(0) == before"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
