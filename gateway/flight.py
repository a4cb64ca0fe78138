"""Single flight: one generation per key, its stream shared from the first byte.

A flight is produced by a task of its own, so a leader is no more than the first to board: whoever leaves, the others
fly on, and when nobody is left the task is cancelled and with it the call to the backend.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from types import TracebackType
from typing import Generic, Self, TypeVar

Head = TypeVar("Head")
"""What a flight resolves to before its first event: a whole answer, or the head of a stream."""


class Flight(Generic[Head]):
    """One generation: a head, then events, then the end or an error.

    Events are kept from the first on, so that who boards late misses nothing. Beyond `limit` bytes nobody can board
    any more, what all passengers have read is dropped, and the producer waits for the slowest: memory stays bounded.
    """

    def __init__(self, limit: int, charge: Callable[[int], None]) -> None:
        """Bound the events kept by `limit` bytes; `charge` hears of every change of the bytes held."""
        self.head: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self.overflown = False
        self._limit = limit
        self._charge = charge
        self._events: list[bytes] = []
        self._base = 0
        self._size = 0
        self._ended = False
        self._error: Exception | None = None
        self._passengers: list[Passenger[Head]] = []
        self._sleepers: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def resolve(self, head: Head) -> None:
        """Say what kind of answer this is; events may follow."""
        if not self.head.done():
            self.head.set_result(head)
        self._wake()

    async def publish(self, event: bytes) -> None:
        """Hand one event to all passengers; waits only when the flight holds more than its limit."""
        self._events.append(event)
        self._resize(len(event))
        if self._size > self._limit:
            self.overflown = True
        self._wake()
        while self._size > self._limit and self._trim() == 0:
            await self._sleep()

    def end(self, error: Exception | None = None) -> None:
        """End the flight; an error reaches every passenger, at its head if there is none yet."""
        self._ended = True
        self._error = error
        if not self.head.done():
            self.head.set_exception(error or RuntimeError("a flight ended without a head"))
            self.head.exception()
        self._wake()

    def board(self) -> Passenger[Head]:
        """Add a passenger that reads from the first event on."""
        passenger = Passenger(self)
        self._passengers.append(passenger)
        return passenger

    def launch(self, produce: Awaitable[None]) -> asyncio.Task[None]:
        """Start the producer; its exceptions become the flight's error."""
        self._task = asyncio.ensure_future(self._run(produce))
        return self._task

    async def _run(self, produce: Awaitable[None]) -> None:
        try:
            await produce
        except asyncio.CancelledError:
            self.end(RuntimeError("the generation was cancelled"))
            raise
        except Exception as error:
            self.end(error)
        else:
            self.end()

    def _leave(self, passenger: Passenger[Head]) -> None:
        self._passengers.remove(passenger)
        if self._passengers:
            self._wake()
            return
        self._resize(-self._size)
        self._events.clear()
        if self._task is not None and not self._ended:
            self._task.cancel()

    @property
    def abandoned(self) -> bool:
        """Whether nobody is left to hear of it."""
        return not self._passengers

    def _trim(self) -> int:
        """Drop the events that every passenger has read; return how many bytes that freed."""
        read = min((passenger.position for passenger in self._passengers), default=self._base) - self._base
        freed = sum(map(len, self._events[:read]))
        del self._events[:read]
        self._base += read
        self._resize(-freed)
        return freed

    def _resize(self, delta: int) -> None:
        self._size += delta
        self._charge(delta)

    def _wake(self) -> None:
        sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    async def _sleep(self) -> None:
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append(sleeper)
        await sleeper

    def _since(self, position: int) -> list[bytes]:
        return self._events[position - self._base :]


class Passenger(Generic[Head]):
    """One reader of a flight; leaves it when the `with` block ends."""

    def __init__(self, flight: Flight[Head]) -> None:
        self._flight = flight
        self.position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flight._leave(self)

    async def head(self) -> Head:
        """Wait for the head; cancelling one passenger's wait leaves the others' alone. Raises the flight's error."""
        return await asyncio.shield(self._flight.head)

    async def events(self) -> AsyncIterator[list[bytes]]:
        """Yield events as they come, those that wait together in one list; raises the flight's error after the last."""
        flight = self._flight
        while True:
            waiting = flight._since(self.position)
            if waiting:
                self.position += len(waiting)
                if flight.overflown:
                    flight._wake()
                yield waiting
            elif flight._ended:
                if flight._error is not None:
                    raise flight._error
                return
            else:
                await flight._sleep()

    async def landed(self) -> None:
        """Wait for the end without reading the events. Raises the flight's error."""
        async for _ in self.events():
            pass


class Flights(Generic[Head]):
    """The flights in the air, by key."""

    def __init__(self, limit: int, charge: Callable[[int], None]) -> None:
        """See Flight for `limit` and `charge`."""
        self._limit = limit
        self._charge = charge
        self._flights: dict[Hashable, Flight[Head]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def board(
        self, key: Hashable, produce: Callable[[Flight[Head]], Awaitable[None]], *, alone: bool = False
    ) -> tuple[Passenger[Head], bool]:
        """Join the flight of this key, or start one; the second value says whether it was joined.

        `alone` starts a flight that nobody else can join.
        """
        flight = None if alone else self._flights.get(key)
        if flight is not None and not flight.overflown and not flight.abandoned:
            return flight.board(), True
        flight = Flight[Head](self._limit, self._charge)
        passenger = flight.board()
        if not alone:
            self._flights[key] = flight
        task = flight.launch(produce(flight))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._landed(key, flight, done))
        return passenger, False

    async def close(self) -> None:
        """Cancel what is in the air and wait until it is down."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _landed(self, key: Hashable, flight: Flight[Head], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._flights.get(key) is flight:
            del self._flights[key]
