"""Answering: a stored or generated answer in the form that the client asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from gateway.wire.pace import Pace, cut
from policies.reasons import Miss, NotStored

_UNREADABLE = frozenset({NotStored.ERROR_STATUS, NotStored.MALFORMED, NotStored.TOO_LARGE})
"""Answers that nobody has understood; they are passed on as they are."""


@dataclass(frozen=True, slots=True)
class Ride:
    """One client on a flight."""

    plan: Plan
    passenger: Passenger[FlightHead]
    respond: Responder
    reason: Miss
    """Why the cache did not answer."""
    joined: bool
    """Somebody else's call launched the flight."""

    def headers(self, head: Generated | Streaming, status: int, kept: NotStored | None) -> Headers:
        """Return our own headers of an answer that came from a backend."""
        return [
            (b"cache-status", miss_status(self.reason, status, kept=kept, collapsed=self.joined)),
            (b"x-hitpath-category", head.looked.policy.name.encode()),
            (b"x-hitpath-upstream", head.backend.encode()),
            (b"server-timing", self.plan.timing.header()),
            *_judged(head.looked),
        ]


class Answering:
    """Writes heads and bodies, whole or as a stream."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float], paces: Mapping[str, Pace]) -> None:
        """`clock` gives Unix seconds; `paces` has the categories whose answers are replayed at one."""
        self._metrics = metrics
        self._clock = clock
        self._paces = paces

    def paced(self, plan: Plan, hit: Hit) -> bool:
        """Whether a stored answer takes its time to be sent."""
        return plan.call.stream and hit.category in self._paces

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
        if self.paced(plan, hit):
            await self._paced(plan, hit, respond, headers)
            return
        body = _replayed(plan, hit.body) if plan.call.stream else hit.body
        await respond.whole(200, headers, body)

    async def _paced(self, plan: Plan, hit: Hit, respond: Responder, headers: Headers) -> None:
        """Send a stored answer's events one by one, each when it is due; who leaves cancels it."""
        pace = self._paces[hit.category]
        await respond.start(200, headers)
        due = time.monotonic()
        for event in cut(plan.wire.replay(hit.body, include_usage=plan.call.include_usage), pace.size):
            await asyncio.sleep(due - time.monotonic())
            await respond.piece(event)
            due += pace.interval
        await respond.piece(b"", last=True)

    async def generated(self, ride: Ride, head: Generated) -> None:
        """Send a backend's whole answer, to a client that wants events as events."""
        plan = ride.plan
        kept = head.kept if isinstance(head.kept, NotStored) else None
        headers = ride.headers(head, head.status, kept)
        if not isinstance(head.kept, NotStored):
            headers.append((b"x-hitpath-entry", b"%d" % head.kept))
        replayed = plan.call.stream and head.kept not in _UNREADABLE
        body = _replayed(plan, head.body) if replayed else head.body
        await ride.respond.whole(head.status, _combined(head.headers, headers, EVENTS if replayed else None), body)

    async def streaming(self, ride: Ride, head: Streaming) -> None:
        """Pass a stream on, or its sum to a client that wants no events."""
        if ride.plan.call.stream:
            await self._events(ride, head)
        else:
            await self._landed(ride, head)

    async def _events(self, ride: Ride, head: Streaming) -> None:
        """Pass events on as they come; an error behind the head becomes an event."""
        call, respond = ride.plan.call, ride.respond
        await respond.start(200, _combined(head.headers, ride.headers(head, 200, head.kept), None))
        hides_usage = call.endpoint in USAGE_IN_STREAM and not call.include_usage
        try:
            async for events in ride.passenger.events():
                shown = [event for event in events if event is not head.usage] if hides_usage else events
                if shown:
                    await respond.piece(b"".join(shown))
        except ApiError as error:
            self._metrics.error(error.code)
            await respond.piece(error_event(call.endpoint, error.document()))
        await respond.piece(b"", last=True)

    async def _landed(self, ride: Ride, head: Streaming) -> None:
        await ride.passenger.landed()
        if not head.body:
            raise BackendBrokenError(f"upstream {head.backend} streamed an answer too large to be added up")
        headers = _combined(head.headers, ride.headers(head, 200, head.kept), JSON)
        await ride.respond.whole(200, headers, head.body)


def _replayed(plan: Plan, body: bytes) -> bytes:
    return b"".join(plan.wire.replay(body, include_usage=plan.call.include_usage))


def _judged(looked: Looked) -> Headers:
    if looked.similarity is None:
        return []
    headers = [
        (b"x-hitpath-similarity", b"%.4f" % looked.similarity),
        (b"x-hitpath-threshold", b"%.4g" % looked.policy.threshold),
    ]
    probabilities = [verdict.probability for verdict in looked.verdicts if verdict.probability is not None]
    if probabilities:
        headers.append((b"x-hitpath-probability", b"%.4f" % max(probabilities)))
    return headers


def _combined(theirs: Headers, ours: Headers, content_type: tuple[bytes, bytes] | None) -> Headers:
    """Return the backend's headers with ours; the length is sent anew, and a changed form has another type."""
    replaced = {name for name, _ in ours} | {b"content-length"}
    if content_type is not None:
        replaced |= {b"content-type", b"content-encoding"}
        ours = [content_type, *ours]
    return [item for item in theirs if item[0] not in replaced] + ours
