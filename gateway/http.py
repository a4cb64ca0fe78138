"""The doors: one ASGI callable for each kind of path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from random import getrandbits
from typing import Any, cast
from urllib.parse import unquote

import orjson

from gateway.call import Call, parse_body, read_controls
from gateway.errors import ApiError, BackendBrokenError, InternalError, MethodError, TooLargeError
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.responder import JSON, Responder, Send
from gateway.tenants import Tenants, credential
from gateway.upstream import Ask, Backend, Headers, Router

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Scope = MutableMapping[str, Any]

log = logging.getLogger(__name__)

_LISTING = 10.0
"""Seconds within which a backend has to list its models."""
_LARGEST_LIST = 4 * 2**20


class ClientGone(Exception):
    """The client hung up before it had sent its whole request."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request as ASGI gives it, its headers by lower-cased name."""

    scope: Scope
    receive: Receive
    headers: dict[str, str]

    @property
    def method(self) -> str:
        """GET, POST, …"""
        return cast(str, self.scope["method"])

    @property
    def path(self) -> str:
        """Decoded."""
        return cast(str, self.scope["path"])

    @property
    def query(self) -> str:
        """As it came, without the question mark."""
        return cast(bytes, self.scope["query_string"]).decode("latin-1")


Door = Callable[[Request, Responder], Awaitable[None]]


class Guard:
    """Wraps a door: every error of ours becomes one answer of the right shape, every other one a 500 and a trace."""

    def __init__(self, door: Door, metrics: Metrics) -> None:
        """`door` raises ApiError as long as it has sent nothing."""
        self._door = door
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = _headers(scope)
        respond = Responder(send, headers.get("x-request-id") or f"req_{getrandbits(128):032x}")
        try:
            await self._door(Request(scope, receive, headers), respond)
        except ClientGone:
            self._metrics.disconnects.inc()
        except ApiError as error:
            await self._tell(error, respond)
        except Exception:
            log.exception("a request failed")
            await self._tell(InternalError("the gateway failed; its log has the trace"), respond)

    async def _tell(self, error: ApiError, respond: Responder) -> None:
        self._metrics.error(error.code)
        if respond.started:
            # The head is out: the only honest end is a broken connection, which the server makes of an exception.
            raise error
        await respond.error(error)


class Inbox:
    """One client's side of a request: its body, and then the news that it has hung up."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises ClientGone."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            if not more:
                self._ended.set()
            if message.get("body"):
                yield message["body"]

    async def read(self, headers: dict[str, str], limit: int) -> bytes:
        """Return the whole body. Raises TooLargeError beyond `limit` bytes, at once where the length is announced."""
        announced = headers.get("content-length", "")
        parts: list[bytes] = []
        size = int(announced) if announced.isdigit() else 0
        if size <= limit:
            size = 0
            async for chunk in self.chunks():
                size += len(chunk)
                if size > limit:
                    break
                parts.append(chunk)
        if size > limit:
            raise TooLargeError(f"the body is larger than the {limit} bytes that server.max_body allows")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def until_gone(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work unless the client hangs up first; then it is cancelled and ClientGone raised."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
        finally:
            task.cancel()
            watcher.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)
        task.result()

    async def _gone(self) -> None:
        await self._ended.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class CachedDoor:
    """A path that the cache answers."""

    def __init__(
        self, endpoint: str, path: str, pipeline: Pipeline, tenants: Tenants, unread: Door, max_body: int
    ) -> None:
        """`path` is what follows the version; `unread` takes bodies that cannot be read; `max_body` is in bytes."""
        self._endpoint = endpoint
        self._path = path
        self._pipeline = pipeline
        self._tenants = tenants
        self._unread = unread
        self._max_body = max_body

    async def __call__(self, request: Request, respond: Responder) -> None:
        """Answer from memory at once, or take the whole way while watching for the client's leaving."""
        if request.method != "POST":
            raise MethodError(f"{request.method} is not allowed here; use POST")
        if request.headers.get("content-encoding", "identity") != "identity":
            await self._unread(request, respond)
            return
        inbox = Inbox(request.receive)
        raw = await inbox.read(request.headers, self._max_body)
        plan = self._pipeline.plan(self._call(request, raw, respond.request_id), request.headers)
        if plan.call.controls.explain:
            await self._pipeline.explain(plan, respond)
            return
        hit = self._pipeline.hot(plan)
        if hit is not None and not self._pipeline.takes_time(plan, hit):
            await self._pipeline.answer_hit(plan, hit, respond)
            return
        await inbox.until_gone(self._pipeline.answer(plan, respond))

    def _call(self, request: Request, raw: bytes, request_id: str) -> Call:
        return Call(
            endpoint=self._endpoint,
            path=self._path,
            query=request.query,
            headers=request.scope["headers"],
            raw=raw,
            body=parse_body(raw),
            controls=read_controls(request.headers),
            caller=self._tenants.identify(credential(request.headers)),
            request_id=request_id,
        )


class PassThroughDoor:
    """Any other path below the version: bytes in, bytes out, both as streams."""

    def __init__(self, router: Router, tenants: Tenants) -> None:
        """The first reachable backend serves it, or the one that `x-hitpath-upstream` names."""
        self._router = router
        self._tenants = tenants

    async def __call__(self, request: Request, respond: Responder) -> None:
        """Pass the request to a backend and its answer back."""
        headers = request.headers
        self._tenants.identify(credential(headers))
        inbox = Inbox(request.receive)
        has_body = "content-length" in headers or "transfer-encoding" in headers
        path = request.scope["raw_path"].partition(b"?")[0].decode("latin-1").removeprefix("/v1")
        body = inbox.chunks() if has_body else None
        ask = Ask(request.method, path, request.query, request.scope["headers"], body)
        pool = self._pool(path, headers.get("x-hitpath-upstream"))
        if not has_body:
            await inbox.read(headers, 0)
        await inbox.until_gone(self._pass(pool, ask, respond))

    def _pool(self, path: str, wanted: str | None) -> tuple[Backend, ...]:
        if wanted is not None:
            return self._router.named(wanted)
        if path.startswith("/models/"):
            return self._router.pool(unquote(path.removeprefix("/models/")))
        return self._router.backends

    async def _pass(self, pool: tuple[Backend, ...], ask: Ask, respond: Responder) -> None:
        async with self._router.send(pool, ask) as (_, reply):
            await respond.start(reply.status, reply.headers, untouched=True)
            async for chunk in reply.chunks():
                await respond.piece(chunk)
            await respond.piece(b"", last=True)


class ModelsDoor:
    """`GET /v1/models`: the backends' lists merged, each model once, those that are not routed left out."""

    def __init__(self, router: Router, tenants: Tenants) -> None:
        """Backends that do not answer are left out; if none does, that is an error."""
        self._router = router
        self._tenants = tenants

    async def __call__(self, request: Request, respond: Responder) -> None:
        """List the models."""
        if request.method != "GET":
            raise MethodError(f"{request.method} is not allowed here; use GET")
        self._tenants.identify(credential(request.headers))
        headers = [item for item in request.scope["headers"] if item[0] != b"accept-encoding"]
        asked = [self._list(backend, headers) for backend in self._router.backends]
        lists = await asyncio.gather(*asked, return_exceptions=True)
        models: dict[str, Any] = {}
        for listed in lists:
            if isinstance(listed, list):
                models = {item["id"]: item for item in listed} | models
        if not any(isinstance(listed, list) for listed in lists):
            raise next(fault for fault in lists if isinstance(fault, BaseException))
        await respond.whole(200, [JSON], orjson.dumps({"object": "list", "data": list(models.values())}))

    async def _list(self, backend: Backend, headers: Headers) -> list[dict[str, Any]]:
        ask = Ask("GET", "/models", "", headers, None)
        async with asyncio.timeout(_LISTING), backend.send(ask) as reply:
            body = await reply.read(_LARGEST_LIST)
        try:
            listed = orjson.loads(body)["data"]
            return [item for item in listed if backend.serves(item["id"])]
        except (orjson.JSONDecodeError, LookupError, TypeError) as error:
            raise BackendBrokenError(f"upstream {backend.name} answered /models with no list of models") from error


def _headers(scope: Scope) -> dict[str, str]:
    """Return the request's headers by lower-cased name; of repeated ones the values joined (RFC 9110 §5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
