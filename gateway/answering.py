"""Answering: a stored or generated answer in the form that the client asked for."""

from __future__ import annotations

from collections.abc import Callable

from cachestore import Hit
from gateway.errors import ApiError, BackendBrokenError
from gateway.flight import Passenger
from gateway.generation import USAGE_IN_STREAM
from gateway.metrics import Metrics
from gateway.plan import FlightHead, Generated, Plan, Streaming
from gateway.responder import EVENTS, JSON, Responder, hit_status, miss_status
from gateway.semantic import Looked
from gateway.upstream import Headers
from gateway.wire.errors import error_event
from policies.reasons import Miss, NotStored

_UNREADABLE = frozenset({NotStored.ERROR_STATUS, NotStored.MALFORMED, NotStored.TOO_LARGE})
"""Answers that nobody has understood; they are passed on as they are."""


class Answering:
    """Writes heads and bodies, whole or as a stream."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        """`clock` gives Unix seconds."""
        self._metrics = metrics
        self._clock = clock

    async def hit(self, plan: Plan, hit: Hit, respond: Responder, detail: str, looked: Looked | None) -> None:
        """Send a stored answer; `looked` is what the semantic room said, if that is where it was found."""
        now = self._clock()
        headers = [
            EVENTS if plan.call.stream else JSON,
            (b"cache-status", hit_status(detail, hit.expires - now)),
            (b"age", b"%d" % max(0.0, now - hit.created)),
            (b"x-hitpath-category", hit.category.encode()),
            (b"x-hitpath-entry", b"%d" % hit.id),
            (b"x-hitpath-upstream", hit.upstream.encode()),
            (b"server-timing", plan.timing.header()),
            *(_judged(looked) if looked is not None else ()),
        ]
        body = _replayed(plan, hit.body) if plan.call.stream else hit.body
        await respond.whole(200, headers, body)

    async def generated(self, plan: Plan, head: Generated, respond: Responder, reason: Miss, *, joined: bool) -> None:
        """Send a backend's whole answer, to a client that wants events as events."""
        kept = head.kept if isinstance(head.kept, NotStored) else None
        status = miss_status(reason, head.status, kept=kept, collapsed=joined)
        headers = _miss_headers(plan, head.looked, head.backend, status)
        if not isinstance(head.kept, NotStored):
            headers.append((b"x-hitpath-entry", b"%d" % head.kept))
        replayed = plan.call.stream and head.kept not in _UNREADABLE
        body = _replayed(plan, head.body) if replayed else head.body
        await respond.whole(head.status, _combined(head.headers, headers, EVENTS if replayed else None), body)

    async def stream(
        self,
        plan: Plan,
        head: Streaming,
        passenger: Passenger[FlightHead],
        respond: Responder,
        reason: Miss,
        *,
        joined: bool,
    ) -> None:
        """Pass a stream on; an error behind its head becomes an event."""
        status = miss_status(reason, 200, kept=head.kept, collapsed=joined)
        headers = _miss_headers(plan, head.looked, head.backend, status)
        await respond.start(200, _combined(head.headers, headers, None))
        hides_usage = plan.call.endpoint in USAGE_IN_STREAM and not plan.call.include_usage
        try:
            async for events in passenger.events():
                shown = [event for event in events if event is not head.usage] if hides_usage else events
                if shown:
                    await respond.piece(b"".join(shown))
        except ApiError as error:
            self._metrics.error(error.code)
            await respond.piece(error_event(plan.call.endpoint, error.document()))
        await respond.piece(b"", last=True)

    async def landed(
        self,
        plan: Plan,
        head: Streaming,
        passenger: Passenger[FlightHead],
        respond: Responder,
        reason: Miss,
        *,
        joined: bool,
    ) -> None:
        """Answer a client that wants no events from a flight that has them."""
        await passenger.landed()
        if not head.body:
            raise BackendBrokenError(f"upstream {head.backend} streamed an answer too large to be added up")
        status = miss_status(reason, 200, kept=head.kept, collapsed=joined)
        headers = _miss_headers(plan, head.looked, head.backend, status)
        await respond.whole(200, _combined(head.headers, headers, JSON), head.body)


def _replayed(plan: Plan, body: bytes) -> bytes:
    return b"".join(plan.wire.replay(body, include_usage=plan.call.include_usage))


def _judged(looked: Looked) -> Headers:
    if looked.score is None:
        return []
    return [
        (b"x-hitpath-similarity", b"%.4f" % looked.score),
        (b"x-hitpath-threshold", b"%.4g" % looked.policy.threshold),
    ]


def _miss_headers(plan: Plan, looked: Looked, backend: str, status: bytes) -> Headers:
    return [
        (b"cache-status", status),
        (b"x-hitpath-category", looked.policy.name.encode()),
        (b"x-hitpath-upstream", backend.encode()),
        (b"server-timing", plan.timing.header()),
        *_judged(looked),
    ]


def _combined(theirs: Headers, ours: Headers, content_type: tuple[bytes, bytes] | None) -> Headers:
    """Return the backend's headers with ours; the length is sent anew, and a changed form has another type."""
    replaced = {name for name, _ in ours} | {b"content-length"}
    if content_type is not None:
        replaced |= {b"content-type", b"content-encoding"}
        ours = [content_type, *ours]
    return [item for item in theirs if item[0] not in replaced] + ours
