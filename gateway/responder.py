"""What a client is told about an answer: the headers of hits, misses and bypasses, and the act of sending."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from gateway.errors import ApiError
from gateway.upstream import Headers
from policies.reasons import Bypass, Miss, NotStored

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
_PLAIN = frozenset({Miss.ABSENT, Miss.NO_NEIGHBOUR, Miss.BELOW_THRESHOLD})
_BY_REQUEST = frozenset({Miss.TOO_OLD, Miss.REFRESH})


def hit_status(detail: str, ttl: float) -> bytes:
    """Return `Cache-Status` (RFC 9211) of a hit; a stale one has a negative ttl in seconds."""
    return b"hitpath; hit; ttl=%d; detail=%s" % (ttl, detail.encode())


def miss_status(reason: Miss | Bypass, status: int, *, kept: NotStored | None, collapsed: bool = False) -> bytes:
    """Return `Cache-Status` of a forwarded call; `kept` None means that the answer is stored."""
    parts = [f"hitpath; fwd={_forwarded(reason)}", f"fwd-status={status}"]
    if kept is None:
        parts.append("stored")
    if collapsed:
        parts.append("collapsed")
    if kept is not None or reason not in _PLAIN:
        parts.append(f"detail={kept if kept is not None and not isinstance(reason, Bypass) else reason}")
    return "; ".join(parts).encode()


def _forwarded(reason: Miss | Bypass) -> str:
    if isinstance(reason, Bypass):
        return "bypass"
    if reason in _BY_REQUEST:
        return "request"
    return "stale" if reason is Miss.STALE else "miss"


class Responder:
    """Sends one answer to the client, whole or in pieces."""

    def __init__(self, send: Send, request_id: str) -> None:
        """`request_id` goes out with every answer."""
        self._send = send
        self.request_id = request_id
        self.started = False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a complete answer."""
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.piece(body, last=True)

    async def start(self, status: int, headers: Headers, *, untouched: bool = False) -> None:
        """Send the head; `untouched` adds nothing to it."""
        self.started = True
        if not untouched and not any(name == b"x-request-id" for name, _ in headers):
            headers = [*headers, (b"x-request-id", self.request_id.encode("latin-1", "replace"))]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def piece(self, body: bytes, *, last: bool = False) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def error(self, error: ApiError, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Send an error of our own."""
        await self.whole(error.status, [*error.headers(), *headers], error.body())
