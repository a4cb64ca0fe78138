"""Single flight: sharing, leaving, cancelling, bounding."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gateway.flight import Flight, Flights, Passenger


class Ledger:
    """Adds up what a flight charges."""

    def __init__(self) -> None:
        self.held = 0

    def __call__(self, delta: int) -> None:
        self.held += delta


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def flights(ledger: Ledger) -> Flights[str]:
    return Flights(100, ledger)


class Script:
    """A producer whose steps the test allows one by one."""

    def __init__(self, *events: bytes, error: Exception | None = None) -> None:
        self.events = events
        self.error = error
        self.starts = 0
        self.gate = asyncio.Semaphore(0)
        self.cancelled = asyncio.Event()

    def __call__(self, flight: Flight[str]) -> Awaitable[None]:
        return self._produce(flight)

    async def _produce(self, flight: Flight[str]) -> None:
        self.starts += 1
        try:
            await self.gate.acquire()
            flight.resolve("head")
            for event in self.events:
                await self.gate.acquire()
                await flight.publish(event)
            await self.gate.acquire()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def allow(self, steps: int = 1000) -> None:
        for _ in range(steps):
            self.gate.release()


async def read(passenger: Passenger[str]) -> list[bytes]:
    with passenger:
        assert await passenger.head() == "head"
        return [event async for events in passenger.events() for event in events]


async def settled(flights: Flights[str]) -> None:
    while len(flights):
        await asyncio.sleep(0)


async def test_one_production_serves_all_from_the_first_event_on(flights: Flights[str], ledger: Ledger) -> None:
    script = Script(b"a", b"b", b"c")
    leader, joined = flights.board("k", script)
    assert not joined
    early = asyncio.create_task(read(leader))
    script.allow(3)
    await asyncio.sleep(0.01)
    follower, joined = flights.board("k", script)
    assert joined
    late = asyncio.create_task(read(follower))
    script.allow()
    assert await early == await late == [b"a", b"b", b"c"]
    await settled(flights)
    assert (script.starts, ledger.held) == (1, 0)


async def test_another_key_and_a_lone_flight_are_flights_of_their_own(flights: Flights[str]) -> None:
    script = Script()
    script.allow()
    boarded = [flights.board(key, script, alone=alone) for key, alone in (("k", False), ("l", False), ("k", True))]
    assert [joined for _, joined in boarded] == [False, False, False]
    await asyncio.gather(*(read(passenger) for passenger, _ in boarded))
    assert script.starts == 3


async def test_a_leader_that_leaves_does_not_cut_off_its_followers(flights: Flights[str]) -> None:
    script = Script(b"a", b"b")
    leader, _ = flights.board("k", script)
    reading = asyncio.create_task(read(leader))
    follower, _ = flights.board("k", script)
    script.allow(2)
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    script.allow()
    assert await read(follower) == [b"a", b"b"]


async def test_when_nobody_is_left_the_production_is_cancelled(flights: Flights[str], ledger: Ledger) -> None:
    script = Script(b"a" * 10, b"b")
    readers = [asyncio.create_task(read(flights.board("k", script)[0])) for _ in range(3)]
    script.allow(2)
    await asyncio.sleep(0.01)
    assert ledger.held == 10
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await asyncio.wait_for(script.cancelled.wait(), 5)
    await settled(flights)
    assert ledger.held == 0
    script.allow()
    fresh, joined = flights.board("k", script)
    assert not joined
    assert await read(fresh) == [b"a" * 10, b"b"]


async def test_an_error_before_the_head_reaches_everybody(flights: Flights[str]) -> None:
    async def fail(flight: Flight[str]) -> None:
        raise ValueError("no")

    boarded = [flights.board("k", fail)[0] for _ in range(2)]
    for outcome in await asyncio.gather(*map(read, boarded), return_exceptions=True):
        assert isinstance(outcome, ValueError)


async def test_an_error_behind_some_events_comes_after_them(flights: Flights[str]) -> None:
    script = Script(b"a", error=ValueError("broken"))
    script.allow()
    passenger, _ = flights.board("k", script)
    seen: list[bytes] = []
    with passenger, pytest.raises(ValueError, match="broken"):
        async for events in passenger.events():
            seen += events
    assert seen == [b"a"]


async def test_a_long_stream_stays_bounded_and_waits_for_the_slowest(flights: Flights[str], ledger: Ledger) -> None:
    events = [bytes([number]) * 40 for number in range(20)]
    script = Script(*events)
    script.allow()
    slow, _ = flights.board("k", script)
    fast = asyncio.create_task(read(flights.board("k", script)[0]))
    await asyncio.sleep(0.01)
    assert ledger.held <= 140
    assert not fast.done()
    _, joined = flights.board("k", Script())
    assert not joined, "nobody may board a stream whose beginning is gone"
    assert await read(slow) == events
    assert await fast == events


async def test_a_slow_passenger_that_leaves_frees_the_others(flights: Flights[str]) -> None:
    events = [bytes([number]) * 40 for number in range(20)]
    script = Script(*events)
    script.allow()
    slow, _ = flights.board("k", script)
    fast = asyncio.create_task(read(flights.board("k", script)[0]))
    await asyncio.sleep(0.01)
    with slow:
        pass
    assert await fast == events


async def test_closing_cancels_what_is_in_the_air(flights: Flights[str]) -> None:
    script = Script(b"a")
    reader = asyncio.create_task(read(flights.board("k", script)[0]))
    await asyncio.sleep(0.01)
    await flights.close()
    assert script.cancelled.is_set()
    with pytest.raises(RuntimeError, match="cancelled"):
        await reader


async def test_landing_waits_without_reading(flights: Flights[str]) -> None:
    script = Script(b"a")
    passenger, _ = flights.board("k", script)
    with passenger:
        landing: Callable[[], Awaitable[None]] = passenger.landed
        waiting = asyncio.ensure_future(landing())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        script.allow()
        await waiting
