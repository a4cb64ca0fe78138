"""Real things that stand in for what tests cannot have: here, a backend that does what its script says."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Self, assert_never

import orjson
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.wire import sse
from loadtest.scripted import JSON_TYPE, STREAM_TYPE, Pace, respond


class End(Enum):
    """What happens behind the last part of a reply."""

    COMPLETE = auto()
    ABORT = auto()
    """The connection is torn down."""
    HANG = auto()
    """Nothing, until the client goes."""


Part = bytes | asyncio.Event
"""Bytes to send, or a gate to wait at: the test opens it, nobody sleeps."""


@dataclass(frozen=True)
class Reply:
    """An answer word for word."""

    parts: Sequence[Part] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    end: End = End.COMPLETE
    gate: asyncio.Event | None = None
    """What the status line waits for."""


@dataclass(frozen=True)
class Normal:
    """The answer that `loadtest.scripted` derives from the request; each event of a stream is a part."""

    tokens: int = 16
    gate: asyncio.Event | None = None


@dataclass(frozen=True)
class NotHttp:
    """Bytes in place of an HTTP response, and then the connection is closed."""

    data: bytes = b"\x00\x01 this is not HTTP\r\n\r\n"


@dataclass(frozen=True)
class Hang:
    """No byte, ever."""


Script = Reply | Normal | NotHttp | Hang


def json_reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Answer with JSON; bytes are sent as they are."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return Reply((data,), status, {"content-type": JSON_TYPE, **(headers or {})})


def error_reply(status: int, message: str = "scripted", retry_after: str | None = None) -> Reply:
    """Answer with an error of the API's shape."""
    headers = {} if retry_after is None else {"retry-after": retry_after}
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    return json_reply({"error": error}, status, headers)


def stream_reply(
    *parts: Part | dict[str, Any], end: End = End.COMPLETE, gate: asyncio.Event | None = None, done: bool = True
) -> Reply:
    """Answer with a stream: dicts become `data:` events, bytes and gates are taken as they are."""
    written: list[Part] = [sse.encode(orjson.dumps(part)) if isinstance(part, dict) else part for part in parts]
    if done and end is End.COMPLETE:
        written.append(sse.encode(sse.DONE))
    return Reply(written, headers={"content-type": STREAM_TYPE}, end=end, gate=gate)


class Exchange:
    """One request that arrived, and what became of it."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self.method = request.method
        self.path = request.raw_path
        """With the query, as it was on the wire."""
        self.headers: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict(request.headers))
        self.body = body
        self.disconnected = asyncio.Event()
        """Set when the client went before the reply was complete."""
        self.finished = asyncio.Event()
        """Set when the reply is out, or will never be."""

    def json(self) -> Any:
        """Parse the body."""
        return orjson.loads(self.body)


class ScriptedUpstream:
    """A backend on a real socket in the test's own event loop.

    Each request takes the next script, or `default` when there is none. It is an async context manager.
    """

    def __init__(self, *scripts: Script, default: Script | None = None, uds: Path | None = None) -> None:
        self.exchanges: list[Exchange] = []
        self.default: Script = Normal() if default is None else default
        self._scripts = deque(scripts)
        self._uds = uds
        self._port = 0
        self._arrived = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The base URL, `/v1` included."""
        return f"http://127.0.0.1:{self._port}/v1"

    def script(self, *scripts: Script) -> None:
        """Queue what the next requests get."""
        self._scripts.extend(scripts)

    async def arrival(self, count: int = 1) -> Exchange:
        """Wait until `count` requests have arrived in all; give the last of them."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.exchanges) >= count)
        return self.exchanges[count - 1]

    async def start(self) -> None:
        """Listen on the UNIX socket, or on a port of the kernel's choice (the same one after a stop)."""
        runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.0)
        await runner.setup()
        self._runner = runner
        if self._uds is not None:
            await web.UnixSite(runner, str(self._uds)).start()
            return
        await web.TCPSite(runner, "127.0.0.1", self._port).start()
        self._port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the port and every connection: the next client is refused."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        script = self._scripts.popleft() if self._scripts else self.default
        exchange = Exchange(request, await request.read())
        async with self._arrived:
            self.exchanges.append(exchange)
            self._arrived.notify_all()
        try:
            return await self._play(request, exchange, script)
        except (asyncio.CancelledError, ConnectionError):
            exchange.disconnected.set()
            raise
        finally:
            exchange.finished.set()

    async def _play(self, request: web.Request, exchange: Exchange, script: Script) -> web.StreamResponse:
        match script:
            case Normal(tokens, gate):
                answer = respond(request.path, exchange.body, Pace(tokens))
                reply = Reply(answer.parts, answer.status, {"content-type": answer.content_type}, gate=gate)
                return await _send(request, reply)
            case Reply():
                return await _send(request, script)
            case NotHttp(data):
                transport = _transport(request)
                transport.write(data)
                transport.close()
                return web.Response()
            case Hang():
                return await _for_ever()
        assert_never(script)


async def _send(request: web.Request, reply: Reply) -> web.StreamResponse:
    if reply.gate is not None:
        await reply.gate.wait()
    if len(reply.parts) == 1 and isinstance(reply.parts[0], bytes) and reply.end is End.COMPLETE:
        return web.Response(body=reply.parts[0], status=reply.status, headers=reply.headers)
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    await response.prepare(request)
    for part in reply.parts:
        if isinstance(part, asyncio.Event):
            await part.wait()
        else:
            await response.write(part)
    match reply.end:
        case End.COMPLETE:
            await response.write_eof()
        case End.ABORT:
            _transport(request).abort()
        case End.HANG:
            await _for_ever()
    return response


async def _for_ever() -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")


def _transport(request: web.Request) -> asyncio.Transport:
    transport = request.transport
    if not isinstance(transport, asyncio.Transport):
        raise ConnectionResetError("the client is gone")
    return transport


def refused_url() -> str:
    """Give a base URL at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
