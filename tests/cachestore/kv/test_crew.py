"""Threads for work that may never end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from cachestore.kv.crew import Crew

SLOW = 0.05


class Gate:
    """Work that hangs until it is opened."""

    def __init__(self) -> None:
        self.began, self._open, self.over = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.began.set()
        self._open.wait()
        self.over.set()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gates() -> Iterator[Callable[[], Gate]]:
    made: list[Gate] = []

    def gate() -> Gate:
        made.append(Gate())
        return made[-1]

    yield gate
    for one in made:
        one.open()


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(10)


def crew_of(count: int = 2, most: int = 4, slow: float = SLOW, name: str = "crew") -> Crew:
    return Crew(count, name, slow=slow, most=most)


def called(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_work_is_begun_in_order_and_no_more_at_a_time_than_there_are(gates: Callable[[], Gate]) -> None:
    crew, work = crew_of(slow=60.0), [gates() for _ in range(4)]
    for one in work:
        crew.submit(one)
    assert all(one.began.wait(10) for one in work[:2])
    assert not work[2].began.wait(0.05)
    work[1].open()
    assert work[2].began.wait(10)
    assert not work[3].began.is_set()
    for one in work:
        one.open()
    assert work[3].over.wait(10)
    assert crew.close()


def test_others_take_the_place_of_those_that_are_stuck(gates: Callable[[], Gate]) -> None:
    crew, hanging, done = crew_of(), [gates() for _ in range(2)], threading.Event()
    for one in hanging:
        crew.submit(one)
    assert all(one.began.wait(10) for one in hanging)
    crew.submit(done.set)
    time.sleep(SLOW)
    crew.relieve()
    assert done.wait(10)
    assert not crew.stuck()


def test_there_is_a_bound_to_that(gates: Callable[[], Gate]) -> None:
    crew, hanging, done = crew_of(), [gates() for _ in range(4)], threading.Event()
    for one in hanging:
        crew.submit(one)
        assert one.began.wait(10)
        time.sleep(SLOW)
    until(crew.stuck)
    crew.submit(done.set)
    crew.relieve()
    assert not done.wait(0.05)
    hanging[0].open()
    assert done.wait(10)
    assert not crew.stuck()


def test_who_comes_back_is_one_too_many(gates: Callable[[], Gate]) -> None:
    crew, hanging = crew_of(name="returned"), [gates() for _ in range(2)]
    for one in hanging:
        crew.submit(one)
        assert one.began.wait(10)
        time.sleep(SLOW)
    for _ in range(2):
        others = [threading.Barrier(3) for _ in range(2)]
        for barrier in others:
            for _ in range(2):
                crew.submit(partial(_meet, barrier))
            barrier.wait(10)
    assert called("returned") == 4
    for one in hanging:
        one.open()
    until(lambda: called("returned") == 2)
    assert crew.close()
    until(lambda: called("returned") == 0)


def test_closing_waits_for_who_works_and_for_nobody_who_is_stuck(gates: Callable[[], Gate]) -> None:
    crew, hanging, done = crew_of(), gates(), threading.Event()
    crew.submit(hanging)
    assert hanging.began.wait(10)
    time.sleep(SLOW)

    def slowly() -> None:
        time.sleep(SLOW / 2)
        done.set()

    crew.submit(slowly)
    until(lambda: crew._idle == 0 and not crew._waiting)
    assert not crew.close()
    assert done.is_set()
    hanging.open()
    assert hanging.over.wait(10)
    assert crew.close()
    crew.submit(lambda: pytest.fail("too late"))


def test_what_raises_ends_nobody(caplog: pytest.LogCaptureFixture) -> None:
    crew, done = crew_of(count=1), threading.Event()

    def broken() -> None:
        raise OSError("broken")

    crew.submit(broken)
    crew.submit(done.set)
    assert done.wait(10)
    assert crew.close()
    assert "broken" in caplog.text
