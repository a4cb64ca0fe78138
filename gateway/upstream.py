"""Backends: one kind of thing behind one protocol, and the choice among them."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from gateway.errors import (
    ApiError,
    BackendBrokenError,
    BackendTimeoutError,
    BackendUnreachableError,
    BadRequestError,
    NotReadyError,
    UnknownModelError,
)
from gateway.settings import Timeouts, Upstream, secret
from policies.load import Recent

Headers = list[tuple[bytes, bytes]]
Result = TypeVar("Result")

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_FORWARDED = frozenset({b"host", b"expect", b"x-hitpath-tenant"})
_KEYS = frozenset({b"authorization", b"api-key", b"x-api-key"})
"""Where a client's key may stand."""
_TOO_MANY = 429
_COOL_DOWN = 2.0
"""Seconds for which a backend that refused a connection is asked last."""
_LARGE_BODY = 2**20
_MAX_CONNECTIONS = 4096
_KEEP_ALIVE = 4.0
"""Seconds an idle connection is kept: less than the five after which uvicorn, and so most backends, hang up."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request on its way to a backend; `path` is what follows the version, percent-encoded as it came."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes | AsyncIterator[bytes] | None
    namespace: str = ""
    """Whose request it is; told to a bundled engine, which shares nothing between two of them."""


class Reply:
    """A backend's answer: its head at once, its body as it comes."""

    def __init__(self, response: aiohttp.ClientResponse, backend: Backend) -> None:
        self._response = response
        self._backend = backend
        self.status = response.status
        self.headers: Headers = _end_to_end(response.raw_headers)
        self.content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they arrive, undecoded. Raises BackendBrokenError, BackendTimeoutError."""
        content = self._response.content
        while True:
            chunk = await self._backend.within(content.readany(), self._backend.timeouts.idle, "its next bytes")
            if not chunk:
                return
            yield chunk

    async def drain(self, seconds: float) -> None:
        """Wait briefly for the end of a body that is complete by its own account, to keep the connection usable."""
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(seconds):
                while await self._response.content.readany():
                    pass

    async def read(self, limit: int) -> bytes:
        """Return the whole body; raises BackendBrokenError when it is longer than `limit` bytes or breaks off."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self.chunks():
            size += len(chunk)
            if size > limit:
                raise BackendBrokenError(f"upstream {self._backend.name} sent an answer of more than {limit} bytes")
            parts.append(chunk)
        return b"".join(parts)


@dataclass(slots=True)
class Backend:
    """One upstream and its connections."""

    name: str
    url: str
    """Base URL that ends in the version, without a slash."""
    timeouts: Timeouts
    models: tuple[str, ...] = ("*",)
    api_key: str | None = None
    hides_client_key: bool = False
    """The client's key is one of this gateway's tenants' and no business of a backend."""
    uds: Path | None = None
    in_flight: int = 0
    down_until: float = float("-inf")
    recent: Recent = field(default_factory=Recent)
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)

    def serves(self, model: str) -> bool:
        """Say whether the model is one of this backend's."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    @asynccontextmanager
    async def send(self, ask: Ask) -> AsyncIterator[Reply]:
        """Send a request and give its answer's head; leaving the block early hangs up on the backend.

        Raises BackendUnreachableError, BackendTimeoutError, BackendBrokenError.
        """
        self.in_flight += 1
        started = time.monotonic()
        try:
            response = await self.within(self._request(ask), self.timeouts.first_byte, "its answer")
            try:
                yield Reply(response, self)
            finally:
                response.close()
                now = time.monotonic()
                self.recent.note(now - started, refused=response.status == _TOO_MANY, now=now)
        except BackendTimeoutError:
            now = time.monotonic()
            self.recent.note(now - started, refused=False, now=now)
            raise
        finally:
            self.in_flight -= 1

    async def within(self, waited: Awaitable[Result], seconds: float, what: str) -> Result:
        """Await a step of the exchange and tell its failures as errors of our own."""
        try:
            async with asyncio.timeout(seconds):
                return await waited
        except aiohttp.ConnectionTimeoutError as error:
            raise self._unreachable(error) from error
        except TimeoutError as error:
            raise BackendTimeoutError(f"upstream {self.name} did not send {what} within {seconds:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise self._unreachable(error) from error
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            raise BackendBrokenError(f"upstream {self.name} broke off before {what}: {_reason(error)}") from error

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _unreachable(self, error: Exception) -> BackendUnreachableError:
        self.down_until = time.monotonic() + _COOL_DOWN
        if self.uds is not None:
            return NotReadyError(f"the engine of upstream {self.name} is being started again", retry_after=_COOL_DOWN)
        return BackendUnreachableError(f"upstream {self.name} cannot be reached: {_reason(error)}")

    async def _request(self, ask: Ask) -> aiohttp.ClientResponse:
        query = f"?{ask.query}" if ask.query else ""
        return await self._connections().request(
            ask.method,
            URL(f"{self.url}{ask.path}{query}", encoded=True),
            headers=self._forwarded(ask),
            data=_payload(ask.body),
            allow_redirects=False,
        )

    def _forwarded(self, ask: Ask) -> CIMultiDict[str]:
        replaced = _NOT_FORWARDED | _KEYS if self.api_key or self.hides_client_key else _NOT_FORWARDED
        forwarded = CIMultiDict(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in _end_to_end(ask.headers)
            if name not in replaced
        )
        if self.api_key is not None:
            forwarded["authorization"] = f"Bearer {self.api_key}"
        if self.uds is not None and ask.namespace:
            # A hash: namespaces may hold any characters, and headers may not.
            forwarded["x-hitpath-tenant"] = blake2b(ask.namespace.encode(), digest_size=16).hexdigest()
        return forwarded

    def _connections(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector = (
                aiohttp.UnixConnector(str(self.uds), limit=_MAX_CONNECTIONS, keepalive_timeout=_KEEP_ALIVE)
                if self.uds is not None
                else aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, keepalive_timeout=_KEEP_ALIVE)
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeouts.connect),
                read_bufsize=2**18,
                max_line_size=2**16,
                max_field_size=2**16,
            )
        return self._session


class Router:
    """Chooses the backend of a call: the least busy of those that serve the model, the unreachable ones last."""

    def __init__(self, backends: Sequence[Backend], clock: Callable[[], float] = time.monotonic) -> None:
        """The order of the backends is the operator's; among equals the first is taken."""
        self.backends = tuple(backends)
        self._clock = clock

    def pool(self, model: str) -> tuple[Backend, ...]:
        """Return the backends that serve a model, in the operator's order. Raises UnknownModelError."""
        pool = tuple(backend for backend in self.backends if backend.serves(model))
        if not pool:
            served = sorted({pattern for backend in self.backends for pattern in backend.models})
            raise UnknownModelError(
                f"the model {model!r} is not served here; served are {', '.join(served)}", param="model"
            )
        return pool

    def named(self, name: str) -> tuple[Backend, ...]:
        """Return the backend of that name, alone. Raises BadRequestError with the known names."""
        named = tuple(backend for backend in self.backends if backend.name == name)
        if not named:
            known = ", ".join(backend.name for backend in self.backends)
            raise BadRequestError(f"{name!r} is no upstream; known are {known}", param="x-hitpath-upstream")
        return named

    @asynccontextmanager
    async def send(self, pool: Sequence[Backend], ask: Ask) -> AsyncIterator[tuple[Backend, Reply]]:
        """Send to the best backend; while none could be connected to, nothing was sent and the next one is tried."""
        refusals: list[ApiError] = []
        for backend in self._order(pool):
            exchange: AbstractAsyncContextManager[Reply] = backend.send(ask)
            try:
                reply = await exchange.__aenter__()
            except BackendUnreachableError as error:
                refusals.append(error)
                continue
            try:
                yield backend, reply
            finally:
                await exchange.__aexit__(None, None, None)
            return
        raise refusals[-1]

    async def close(self) -> None:
        """Close every backend's connections."""
        for backend in self.backends:
            await backend.close()

    def _order(self, pool: Sequence[Backend]) -> list[Backend]:
        now = self._clock()
        return sorted(pool, key=lambda backend: (backend.down_until > now, backend.in_flight))


def open_backend(upstream: Upstream, *, uds: Path | None, hides_client_key: bool) -> Backend:
    """Make the backend of a setting; `uds` is where the bundled engine listens. Raises SettingsError."""
    bundled = upstream.kind == "bundled"
    named = (Path(upstream.model).name,) if bundled else ("*",)
    return Backend(
        name=upstream.name,
        url="http://engine/v1" if upstream.url is None else upstream.url.rstrip("/"),
        timeouts=upstream.timeouts,
        models=named if upstream.models is None else upstream.models,
        api_key=secret(upstream.api_key_env, key=f"upstreams.{upstream.name}.api_key_env"),
        hides_client_key=hides_client_key,
        uds=uds if bundled else None,
    )


def _payload(body: bytes | AsyncIterator[bytes] | None) -> bytes | io.BytesIO | AsyncIterator[bytes] | None:
    """Give a large body as a file, which is sent piece by piece: as bytes it would hold up the event loop."""
    return io.BytesIO(body) if isinstance(body, bytes) and len(body) > _LARGE_BODY else body


def _end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Leave out what belongs to one connection, the headers that `Connection` names among it (RFC 9110 §7.6.1)."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in lowered if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP and name not in named]


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
