"""Generate, admit, store: a backend's answer on its way to the passengers of a flight and into the log."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

import orjson

from gateway.call import Call
from gateway.errors import BackendBrokenError
from gateway.flight import Flight
from gateway.keeping import Keeper
from gateway.metrics import Metrics
from gateway.plan import FlightHead, Generated, Plan, Streaming
from gateway.semantic import Looked
from gateway.upstream import Ask, Backend, Reply
from gateway.wire import BrokenStream
from gateway.wire.chat import strip_usage
from gateway.wire.sse import DONE, Event, EventTooLarge, SseParser
from policies.reasons import NotStored

_LARGEST_WHOLE = 256 * 2**20
"""Bytes of a non-streamed answer beyond which a backend is taken to be broken."""
_TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})
"""The last event of a `/v1/responses` stream."""
USAGE_IN_STREAM = frozenset({"chat", "completions"})
"""Endpoints whose streams tell their usage only if asked to."""
_DRAIN = 0.25
"""Seconds to wait for the end of a stream behind its end marker, so that the connection can be used again."""


class Generation:
    """Takes in a backend's answer: to the passengers as it comes, into the store when it is whole."""

    def __init__(self, keeper: Keeper, metrics: Metrics, max_answer: int) -> None:
        """Answers of more than `max_answer` bytes pass, but are not stored."""
        self._keeper = keeper
        self._metrics = metrics
        self._max_answer = max_answer

    async def whole(self, plan: Plan, looked: Looked, backend: Backend, reply: Reply, started: float) -> Generated:
        """Read a non-streamed answer and store it. Raises BackendBrokenError."""
        body = await reply.read(_LARGEST_WHOLE)
        seconds = time.perf_counter() - started
        self._metrics.generated(backend.name, seconds)
        kept = await self._keep_whole(plan, looked, backend, reply, body, seconds)
        plan.timing.add("upstream", seconds)
        return Generated(looked, backend.name, reply.status, reply.headers, body, kept)

    async def _keep_whole(
        self, plan: Plan, looked: Looked, backend: Backend, reply: Reply, body: bytes, seconds: float
    ) -> int | NotStored:
        if reply.status != 200:
            return NotStored.ERROR_STATUS
        if len(body) > self._max_answer:
            return NotStored.TOO_LARGE
        if any(name == b"content-encoding" for name, _ in reply.headers):
            return NotStored.MALFORMED
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BackendBrokenError(f"upstream {backend.name} answered 200 with what is not JSON: {error}") from error
        return await self._keeper.keep(plan, looked, backend.name, answer, body, seconds)

    async def stream(
        self, plan: Plan, looked: Looked, backend: Backend, reply: Reply, flight: Flight[FlightHead], started: float
    ) -> None:
        """Tee a stream: every event to the passengers at once, the end marker only after the answer is stored."""
        head = Streaming(looked, backend.name, reply.headers, self._keeper.promise(plan, looked))
        plan.timing.add("upstream", time.perf_counter() - started)
        flight.resolve(head)
        payloads: list[bytes] = []
        last = b""
        async for event in _events(reply, backend, self._max_answer):
            if event.data == DONE or event.event in _TERMINAL:
                if event.data != DONE:
                    payloads.append(event.data)
                last = event.raw
                break
            await self._pass_on(event, head, flight, payloads, backend)
        seconds = time.perf_counter() - started
        self._metrics.generated(backend.name, seconds)
        if flight.overflown:
            self._metrics.not_stored(NotStored.TOO_LARGE)
        else:
            await self._keep_stream(plan, head, payloads, ended=bool(last), seconds=seconds)
        await flight.publish(last or b"data: [DONE]\n\n")
        flight.end()
        await reply.drain(_DRAIN)

    async def _pass_on(
        self, event: Event, head: Streaming, flight: Flight[FlightHead], payloads: list[bytes], backend: Backend
    ) -> None:
        if event.data:
            if not event.data.startswith(b"{"):
                raise BackendBrokenError(f"upstream {backend.name} sent an event that is not a JSON object")
            if strip_usage(event) is None:
                head.usage = event.raw
            if flight.overflown:
                payloads.clear()
            else:
                payloads.append(event.data)
        await flight.publish(event.raw)

    async def _keep_stream(
        self, plan: Plan, head: Streaming, payloads: Sequence[bytes], *, ended: bool, seconds: float
    ) -> None:
        try:
            answer = plan.wire.merge([*payloads, DONE] if ended else payloads)
        except BrokenStream as error:
            self._metrics.not_stored(NotStored.BROKEN_STREAM)
            raise BackendBrokenError(f"upstream {head.backend} ended its stream unfinished: {error}") from error
        head.body = orjson.dumps(answer)
        kept = await self._keeper.keep(plan, head.looked, head.backend, answer, head.body, seconds)
        head.kept = kept if isinstance(kept, NotStored) else None


def backend_request(call: Call) -> Ask:
    """Return the request for the backend: the client's own bytes, but for streams asked for their usage."""
    headers = [item for item in call.headers if item[0] not in _KEPT_BACK]
    headers += [(b"accept-encoding", b"identity"), (b"x-request-id", call.request_id.encode("latin-1", "replace"))]
    raw = call.raw
    if call.stream and call.endpoint in USAGE_IN_STREAM and not call.include_usage:
        options = call.body.get("stream_options")
        if options is None or isinstance(options, dict):
            raw = orjson.dumps({**call.body, "stream_options": {**(options or {}), "include_usage": True}})
    return Ask("POST", call.path, call.query, headers, raw, call.namespace)


_KEPT_BACK = frozenset(
    {
        b"accept-encoding",
        b"content-length",
        b"x-request-id",
        b"cache-control",
        b"x-hitpath-mode",
        b"x-hitpath-category",
        b"x-hitpath-ttl",
        b"x-hitpath-threshold",
        b"x-hitpath-namespace",
    }
)


async def _events(reply: Reply, backend: Backend, max_event: int) -> AsyncIterator[Event]:
    parser = SseParser(max_event)
    try:
        async for chunk in reply.chunks():
            for event in parser.feed(chunk):
                yield event
    except EventTooLarge as error:
        raise BackendBrokenError(f"upstream {backend.name} sent {error}") from error
    if not parser.finish():
        raise BackendBrokenError(f"upstream {backend.name} broke off within an event")
