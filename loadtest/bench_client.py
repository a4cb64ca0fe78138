"""The load generator: HTTP/1.1 on raw sockets, so that the server under test is the limit and not its client.

Requests are bytes made beforehand; of an answer only its length, status and end are read. One core of it asks several
times as fast as one core of a Starlette application answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length: "
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class BenchError(Exception):
    """A server did not do what is measured; the message shows its answer."""


class Answer(NamedTuple):
    """One answer and its times in seconds from the sending of the request."""

    head: bytes
    body: bytes
    first: float
    """To the first byte of the body."""
    whole: float


Done = Callable[[Answer], None]
Failed = Callable[[BenchError], None]


class Connection(asyncio.Protocol):
    """A kept-alive connection, one request at a time. Make it with `connect`."""

    def __init__(self) -> None:
        self._received = b""
        self._body_from = 0
        self._sent = 0.0
        self._first = 0.0
        self._done: Done | None = None
        self._failed: Failed | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, done: Done, failed: Failed) -> None:
        """Send a request; one of the two is called with what comes of it."""
        assert self._transport is not None
        self._done, self._failed = done, failed
        self._received = b""
        self._body_from = 0
        self._sent = time.perf_counter()
        self._transport.write(request)

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer. Raises BenchError when the connection breaks."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.send(request, future.set_result, future.set_exception)
        return await future

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer; at its end tell who waits for it."""
        self._received = self._received + data if self._received else data
        if not self._body_from:
            end = self._received.find(_HEAD_END)
            if end < 0:
                return
            self._body_from = end + len(_HEAD_END)
        if not self._first and len(self._received) > self._body_from:
            self._first = time.perf_counter() - self._sent
        if self._is_whole():
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell who waits; nobody waits on a connection closed by its owner."""
        if self._failed is not None:
            self._failed(BenchError(f"the server hung up: {error or 'end of stream'}"))

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()

    def _is_whole(self) -> bool:
        at = self._received.find(_LENGTH, 0, self._body_from)
        if at < 0:
            return self._received.endswith(_LAST_CHUNK, self._body_from - 2)
        at += len(_LENGTH)
        length = int(self._received[at : self._received.find(b"\r", at)])
        return len(self._received) - self._body_from >= length

    def _finish(self) -> None:
        whole = time.perf_counter() - self._sent
        done, self._done, self._failed = self._done, None, None
        assert done is not None
        cut = self._body_from
        answer = Answer(self._received[:cut], self._received[cut:], self._first, whole)
        self._first = 0.0
        done(answer)


async def connect(port: int) -> Connection:
    """Open a connection to a server on this machine."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a load."""

    seconds: float
    latencies: Sequence[float]
    """Seconds, one for each answer."""

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds within which this share (0 to 100) of the answers came."""
        return float(np.percentile(np.array(self.latencies), share)) * 1000


async def load(port: int, requests: Iterable[bytes], *, connections: int, expect: bytes = b"") -> Load:
    """Send all requests in a closed loop: each connection sends its next one when it has its answer.

    Raises BenchError for a status other than 200, or a head that lacks `expect`.
    """
    waiting = iter(requests)
    latencies: list[float] = []
    opened = [await connect(port) for _ in range(connections)]
    begun = time.perf_counter()
    try:
        await asyncio.gather(*(_drive(connection, waiting, latencies, expect) for connection in opened))
        return Load(time.perf_counter() - begun, latencies)
    finally:
        for connection in opened:
            connection.close()


def _drive(
    connection: Connection, waiting: Iterator[bytes], latencies: list[float], expect: bytes
) -> asyncio.Future[None]:
    """Keep one connection busy by callbacks: a task switch for each answer would cost as much as all the rest."""
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def next_one() -> None:
        request = next(waiting, None)
        if request is None:
            finished.set_result(None)
        else:
            connection.send(request, take, finished.set_exception)

    def take(answer: Answer) -> None:
        latencies.append(answer.whole)
        try:
            check(answer, expect)
        except BenchError as error:
            finished.set_exception(error)
        else:
            next_one()

    next_one()
    return finished


def check(answer: Answer, expect: bytes = b"") -> Answer:
    """Return the answer if it is what is measured. Raises BenchError."""
    if not answer.head.startswith(b"HTTP/1.1 200") or expect not in answer.head:
        raise BenchError(f"expected 200 with {expect!r}, got {(answer.head + answer.body)[:2000].decode('latin-1')}")
    return answer


def chat(system: str, question: str, *, stream: bool = False, headers: bytes = b"") -> bytes:
    """A chat completion's request; `headers` are whole lines."""
    turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    document: dict[str, Any] = {"model": "scripted-1", "messages": turns, "temperature": 0.2}
    return post("/v1/chat/completions", json.dumps(document | ({"stream": True} if stream else {})).encode(), headers)


def post(path: str, body: bytes, headers: bytes = b"") -> bytes:
    """A request with a JSON body; `headers` are whole lines."""
    return (
        b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nauthorization: Bearer bench\r\n"
        b"accept: */*\r\nuser-agent: hitpath-bench\r\n%bcontent-length: %d\r\n\r\n%b"
        % (path.encode(), headers, len(body), body)
    )
