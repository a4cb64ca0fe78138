"""Fewer threads while others want the cores, and all of them again when they do not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.threads import Threads, delayed, idle


class Machine:
    """A clock, and how long the thread stands in line with so many beside it."""

    def __init__(self, cores: int) -> None:
        self.cores, self.busy, self.asleep = cores, 0, False
        self.now = self.stood = self.idle = 0.0
        self.threads = Threads(cores, clock=lambda: self.now, delay=lambda: self.stood, unused=lambda: self.idle)

    def step(self, seconds: float = 0.03) -> int:
        with self.threads.step() as count:
            self.now += seconds
            self.stood += 0.4 * seconds if count + self.busy > self.cores or self.asleep else 0.01 * seconds
            self.idle += 0.3 * seconds if self.asleep else 0.0
        return count

    def steps(self, seconds: float) -> list[int]:
        until = self.now + seconds
        counts = []
        while self.now < until:
            counts.append(self.step())
        return counts


@pytest.mark.parametrize(("cores", "busy"), [(2, 1), (8, 1), (8, 3)])
def test_as_many_as_there_are_cores_for(cores: int, busy: int) -> None:
    machine = Machine(cores)
    assert set(machine.steps(5)) == {cores}
    machine.busy = busy
    machine.steps(5)
    counts = machine.steps(300)
    assert min(counts) == cores - busy
    # Whether there is room for more is tried ever more rarely.
    assert counts.count(cores - busy) > 0.98 * len(counts)
    machine.busy = 0
    machine.steps(130 * busy)
    assert set(machine.steps(5)) == {cores}


def test_one_is_never_too_many() -> None:
    machine = Machine(1)
    machine.busy = 4
    assert set(machine.steps(5)) == {1}


def test_a_moment_of_others_changes_nothing() -> None:
    machine = Machine(2)
    for _ in range(20):
        machine.busy = 1
        machine.step()
        machine.busy = 0
        assert set(machine.steps(1)) == {2}


def test_standing_in_line_beside_an_idle_core_changes_nothing() -> None:
    machine = Machine(2)
    machine.asleep = True
    assert set(machine.steps(10)) == {2}


def test_a_step_that_fails_is_passed_on() -> None:
    threads = Threads(2)
    with pytest.raises(KeyError), threads.step():
        raise KeyError
    with threads.step() as count:
        assert count == 2


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="this kernel does not tell")
def test_the_kernel_tells_who_stands_in_line() -> None:
    assert delayed() >= 0
    # Two busy loops on one core: one of them stands in line half of the time.
    program = (
        "import os, sys, time; from engine.threads import delayed\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "until = time.monotonic() + 1\n"
        "while time.monotonic() < until: pass\n"
        "print(delayed())"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    assert sum(float(one.communicate()[0]) for one in both) > 0.2


@pytest.mark.skipif(not Path("/proc/uptime").exists(), reason="this kernel does not tell")
def test_the_kernel_tells_how_idle_the_cores_are() -> None:
    before = idle()
    time.sleep(0.2)
    assert 0 <= idle() - before < 5
