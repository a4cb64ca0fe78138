"""The life of one request; the only file that knows the order of the rooms.

plan → exact → (board a flight: semantic → route → generate → admit → store) → answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from cachestore import Document, Hit, Store
from gateway.answers import EVENTS, JSON, Responder, hit_status, miss_status
from gateway.call import Call, exact_key, origin
from gateway.errors import ApiError, BackendBrokenError, BadRequestError, NotCachedError
from gateway.flight import Flight, Flights, Passenger
from gateway.metrics import Metrics
from gateway.semantic import Looked, SemanticRoom
from gateway.timing import Timing
from gateway.upstream import Ask, Backend, Headers, Reply, Router
from gateway.wire import BrokenStream, Wire
from gateway.wire.chat import strip_usage
from gateway.wire.endpoints import WIRES
from gateway.wire.errors import error_event
from gateway.wire.sse import DONE, Event, EventTooLarge, SseParser
from policies.admission import admit
from policies.canonical import Origin
from policies.category import CategoryPolicy, CategoryTable, UnknownCategoryError
from policies.controls import Mode
from policies.reasons import Bypass, Miss, NotStored
from policies.scope import comparable

log = logging.getLogger(__name__)

_LARGEST_WHOLE = 256 * 2**20
"""Bytes of a non-streamed answer beyond which a backend is taken to be broken."""
_TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})
"""The last event of a `/v1/responses` stream."""
_USAGE_IN_STREAM = frozenset({"chat", "completions"})
_DRAIN = 0.25
"""Seconds to wait for the end of a stream behind its end marker, so that the connection can be used again."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a call before any room is entered."""

    call: Call
    pool: tuple[Backend, ...]
    decided: CategoryPolicy | None
    bypass: Bypass | None
    origin: Origin
    key: bytes
    fields: dict[str, Any]
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True)
class Found:
    """A flight's head: the cache has an answer of the same meaning."""

    looked: Looked
    hit: Hit


@dataclass(frozen=True, slots=True)
class Generated:
    """A flight's head: a backend's whole answer, an error of its own among them."""

    looked: Looked
    backend: str
    status: int
    headers: Headers
    body: bytes
    kept: int | NotStored


@dataclass(slots=True)
class Streaming:
    """A flight's head: events follow."""

    looked: Looked
    backend: str
    headers: Headers
    kept: NotStored | None
    """What is known when the stream begins: None promises to store it if it ends whole."""
    usage: bytes = b""
    """The usage chunk, which only those see who asked for it."""
    body: bytes = b""
    """The answer added up, once the flight has landed."""


FlightHead = Found | Generated | Streaming


class Pipeline:
    """Takes a call through the rooms and answers it."""

    def __init__(
        self,
        *,
        store: Store,
        semantic: SemanticRoom | None,
        router: Router,
        table: CategoryTable,
        metrics: Metrics,
        max_answer: int,
        stale_grace: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`semantic` is None when nothing is compared by meaning; sizes are in bytes, times in seconds."""
        self._store = store
        self._semantic = semantic
        self._router = router
        self._table = table
        self._metrics = metrics
        self._max_answer = max_answer
        self._stale_grace = stale_grace
        self._clock = clock
        self._flights = Flights[FlightHead](max_answer, lambda delta: store.charge("streams", delta))
        metrics.watch(store.stats, lambda: len(self._flights))

    async def close(self) -> None:
        """Cancel the generations under way."""
        await self._flights.close()

    def plan(self, call: Call, headers: dict[str, str]) -> Plan:
        """Decide what can be decided at once. Raises UnknownModelError, BadRequestError."""
        pool = self._router.pool(call.model)
        decided = self._decided(call)
        where = origin(call, pool[0].name, headers)
        bypass = _bypass(call, decided)
        key, fields = (b"", {}) if bypass is not None else exact_key(where, call.body)
        return Plan(call, pool, decided, bypass, where, key, fields)

    def hot(self, plan: Plan) -> Hit | None:
        """Return the exact answer if it is in memory, fresh and allowed; synchronous: the shortest path."""
        if plan.bypass is not None or plan.call.controls.no_cache:
            return None
        started = time.perf_counter()
        hit = self._store.hot(plan.key)
        if hit is None or self._objection(hit, plan) is not None:
            return None
        plan.timing.add("exact", time.perf_counter() - started)
        return hit

    async def answer_hit(self, plan: Plan, hit: Hit, respond: Responder, *, detail: str = "exact") -> None:
        """Serve a stored answer in the form that the client asked for."""
        self._metrics.hit(plan.call.endpoint, "stale" if detail.startswith("stale") else detail, hit.category)
        await self._serve(plan, hit, respond, detail, [])

    async def answer(self, plan: Plan, respond: Responder) -> None:
        """Answer a call that memory could not. Raises ApiError while nothing was sent yet."""
        if plan.bypass is not None:
            await self._forward(plan, plan.bypass, respond)
            return
        hit, reason = await self._exact(plan)
        if hit is not None and reason is None:
            await self.answer_hit(plan, hit, respond)
            return
        reason = reason or Miss.ABSENT
        passenger, joined = self._flights.board(
            (plan.key, plan.call.controls.variant()),
            lambda flight: self._generate(plan, flight),
            alone=plan.call.controls.no_cache,
        )
        with passenger:
            await self._ride(plan, passenger, respond, reason, hit, joined=joined)

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _decided(self, call: Call) -> CategoryPolicy | None:
        try:
            decided = self._table.decided(call.controls, call.facts)
        except UnknownCategoryError as error:
            raise BadRequestError(str(error), param="x-hitpath-category") from error
        if decided is None and self._semantic is None:
            decided = self._table.fallback()
        return None if decided is None else decided.under(call.controls)

    def _objection(self, hit: Hit, plan: Plan) -> Miss | None:
        """Say why a stored answer may not be served to this call."""
        now = self._clock()
        if plan.call.controls.no_cache:
            return Miss.REFRESH
        if hit.expires <= now:
            return Miss.STALE
        max_age = plan.call.controls.max_age
        return Miss.TOO_OLD if max_age is not None and now - hit.created > max_age else None

    # --- the rooms --------------------------------------------------------------------------------------------------

    async def _exact(self, plan: Plan) -> tuple[Hit | None, Miss | None]:
        """Return the stored answer and what speaks against it; a cache that fails is a miss with a reason."""
        with plan.timing.room("exact"):
            try:
                hit = await self._store.get(plan.key, grace=self._stale_grace)
            except Exception:
                log.exception("the store failed to look up a key")
                return None, Miss.STORE_FAILED
        return (None, None) if hit is None else (hit, self._objection(hit, plan))

    async def _look(self, plan: Plan) -> Looked:
        """Ask the semantic room, if this call can be compared at all."""
        decided = plan.decided
        if self._semantic is not None and (decided is None or decided.mode is Mode.SEMANTIC):
            asked = comparable(plan.call.endpoint, plan.fields)
            if asked is not None:
                return await self._semantic.look(plan.origin, asked, decided, plan.call.controls, plan.timing)
        policy = decided or self._table.fallback().under(plan.call.controls)
        return Looked(policy, Miss.ABSENT)

    async def _generate(self, plan: Plan, flight: Flight[FlightHead]) -> None:
        """Produce a flight: an answer of the same meaning, or a backend's."""
        looked = await self._look(plan)
        controls = plan.call.controls
        if isinstance(looked.found, Hit) and not controls.no_cache and self._objection(looked.found, plan) is None:
            flight.resolve(Found(looked, looked.found))
            return
        if controls.only_if_cached:
            raise NotCachedError("no fresh answer is stored, and the request said only-if-cached")
        started = time.perf_counter()
        async with self._router.send(plan.pool, _ask(plan.call)) as (backend, reply):
            if reply.status == 200 and reply.content_type == "text/event-stream":
                await self._stream(plan, looked, backend, reply, flight, started)
            else:
                flight.resolve(await self._whole(plan, looked, backend, reply, started))

    async def _whole(self, plan: Plan, looked: Looked, backend: Backend, reply: Reply, started: float) -> Generated:
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
        return await self._keep(plan, looked, backend.name, _wire(plan), answer, body, seconds)

    async def _stream(
        self, plan: Plan, looked: Looked, backend: Backend, reply: Reply, flight: Flight[FlightHead], started: float
    ) -> None:
        """Tee a stream: every event to the passengers at once, the end marker only after the answer is stored."""
        head = Streaming(looked, backend.name, reply.headers, admit(None, looked.policy, plan.call.controls))
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
        wire = _wire(plan)
        try:
            answer = wire.merge([*payloads, DONE] if ended else payloads)
        except BrokenStream as error:
            self._metrics.not_stored(NotStored.BROKEN_STREAM)
            raise BackendBrokenError(f"upstream {head.backend} ended its stream unfinished: {error}") from error
        head.body = orjson.dumps(answer)
        await self._keep(plan, head.looked, head.backend, wire, answer, head.body, seconds)

    async def _keep(
        self, plan: Plan, looked: Looked, backend: str, wire: Wire, answer: Any, body: bytes, seconds: float
    ) -> int | NotStored:
        """Admit a whole answer and store it; returns when it is durable, or says why it is not kept."""
        refusal = wire.inspect(answer).refusal if isinstance(answer, dict) else NotStored.MALFORMED
        refused = admit(refusal, looked.policy, plan.call.controls)
        if refused is None:
            kept = await self._put(self._document(plan, looked, backend, body, seconds))
            if not isinstance(kept, NotStored):
                return kept
            refused = kept
        self._metrics.not_stored(refused)
        return refused

    async def _put(self, document: Document) -> int | NotStored:
        try:
            return await self._store.put(document)
        except Exception:
            log.exception("the store failed to keep an answer")
            return NotStored.STORE_FAILED

    def _document(self, plan: Plan, looked: Looked, backend: str, body: bytes, seconds: float) -> Document:
        now = self._clock()
        asked = comparable(plan.call.endpoint, plan.fields)
        return Document(
            key=plan.key,
            scope=looked.scope,
            namespace=plan.call.namespace,
            category=looked.policy.name,
            model=plan.call.model,
            endpoint=plan.call.endpoint,
            upstream=backend,
            text=asked.text if asked is not None else "",
            body=body,
            created=now,
            expires=now + looked.policy.ttl,
            cost=seconds,
            vector=looked.vector if looked.scope else None,
        )

    # --- answering --------------------------------------------------------------------------------------------------

    async def _ride(
        self,
        plan: Plan,
        passenger: Passenger[FlightHead],
        respond: Responder,
        reason: Miss,
        stale: Hit | None,
        *,
        joined: bool,
    ) -> None:
        """Answer from a flight; a stale answer steps in where the backend fails and the client accepts it."""
        fallback = stale if stale is not None and self._may_serve_stale(plan, stale) else None
        try:
            head = await passenger.head()
        except ApiError:
            if fallback is None:
                raise
            await self.answer_hit(plan, fallback, respond, detail="stale-if-error")
            return
        if isinstance(head, Generated) and head.status >= 500 and fallback is not None:
            await self.answer_hit(plan, fallback, respond, detail="stale-if-error")
            return
        if isinstance(head, Found):
            self._metrics.hit(plan.call.endpoint, "semantic", head.hit.category)
            await self._serve(plan, head.hit, respond, "semantic", _judged(head.looked))
            return
        reason = _reason(reason, head.looked)
        self._metrics.miss(plan.call.endpoint, reason, collapsed=joined)
        if isinstance(head, Generated):
            await self._answer_generated(plan, head, respond, reason, joined=joined)
        elif plan.call.stream:
            await self._answer_stream(plan, head, passenger, respond, reason, joined=joined)
        else:
            await self._answer_landed(plan, head, passenger, respond, reason, joined=joined)

    def _may_serve_stale(self, plan: Plan, stale: Hit) -> bool:
        accepted = plan.call.controls.stale_if_error
        return accepted > 0 and self._clock() - stale.expires <= accepted

    async def _serve(self, plan: Plan, hit: Hit, respond: Responder, detail: str, extra: Headers) -> None:
        now = self._clock()
        headers = [
            EVENTS if plan.call.stream else JSON,
            (b"cache-status", hit_status(detail, hit.expires - now)),
            (b"age", b"%d" % max(0.0, now - hit.created)),
            (b"x-hitpath-category", hit.category.encode()),
            (b"x-hitpath-entry", b"%d" % hit.id),
            (b"x-hitpath-upstream", hit.upstream.encode()),
            (b"server-timing", plan.timing.header()),
            *extra,
        ]
        body = _replayed(plan, hit.body) if plan.call.stream else hit.body
        await respond.whole(200, headers, body)

    async def _answer_generated(
        self, plan: Plan, head: Generated, respond: Responder, reason: Miss, *, joined: bool
    ) -> None:
        kept = head.kept if isinstance(head.kept, NotStored) else None
        status = miss_status(reason, head.status, kept=kept, collapsed=joined)
        headers = _miss_headers(plan, head.looked, head.backend, status)
        if not isinstance(head.kept, NotStored):
            headers.append((b"x-hitpath-entry", b"%d" % head.kept))
        replayed = plan.call.stream and head.status == 200 and not isinstance(head.kept, NotStored)
        body = _replayed(plan, head.body) if replayed else head.body
        await respond.whole(head.status, _combined(head.headers, headers, EVENTS if replayed else None), body)

    async def _answer_stream(
        self,
        plan: Plan,
        head: Streaming,
        passenger: Passenger[FlightHead],
        respond: Responder,
        reason: Miss,
        *,
        joined: bool,
    ) -> None:
        status = miss_status(reason, 200, kept=head.kept, collapsed=joined)
        headers = _miss_headers(plan, head.looked, head.backend, status)
        await respond.start(200, _combined(head.headers, headers, None))
        hides_usage = plan.call.endpoint in _USAGE_IN_STREAM and not plan.call.include_usage
        try:
            async for events in passenger.events():
                shown = [event for event in events if event is not head.usage] if hides_usage else events
                if shown:
                    await respond.piece(b"".join(shown))
        except ApiError as error:
            self._metrics.error(error.code)
            await respond.piece(error_event(plan.call.endpoint, error.document()))
        await respond.piece(b"", last=True)

    async def _answer_landed(
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

    async def _forward(self, plan: Plan, reason: Bypass, respond: Responder) -> None:
        """Pass a call through, neither read nor stored."""
        call = plan.call
        ask = Ask("POST", call.path, call.query, call.headers, call.raw)
        async with self._router.send(plan.pool, ask) as (backend, reply):
            self._metrics.miss(call.endpoint, reason, collapsed=False)
            status = miss_status(reason, reply.status, kept=NotStored.FORBIDDEN)
            own = [(b"cache-status", status), (b"x-hitpath-upstream", backend.name.encode())]
            await respond.start(reply.status, [*reply.headers, *own])
            async for chunk in reply.chunks():
                await respond.piece(chunk)
            await respond.piece(b"", last=True)


def _bypass(call: Call, decided: CategoryPolicy | None) -> Bypass | None:
    if call.controls.no_store:
        return Bypass.NO_STORE
    if call.controls.mode is Mode.OFF or (decided is not None and decided.mode is Mode.OFF):
        return Bypass.MODE_OFF
    if call.stateful:
        return Bypass.STATEFUL
    return None


def _ask(call: Call) -> Ask:
    """Return the request for the backend: the client's own bytes, but for streams asked for their usage."""
    headers = [item for item in call.headers if item[0] not in _KEPT_BACK]
    headers += [(b"accept-encoding", b"identity"), (b"x-request-id", call.request_id.encode("latin-1", "replace"))]
    raw = call.raw
    if call.stream and call.endpoint in _USAGE_IN_STREAM and not call.include_usage:
        options = call.body.get("stream_options")
        if options is None or isinstance(options, dict):
            raw = orjson.dumps({**call.body, "stream_options": {**(options or {}), "include_usage": True}})
    return Ask("POST", call.path, call.query, headers, raw)


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


def _wire(plan: Plan) -> Wire:
    return WIRES[plan.call.endpoint]


def _replayed(plan: Plan, body: bytes) -> bytes:
    return b"".join(_wire(plan).replay(body, include_usage=plan.call.include_usage))


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


def _reason(reason: Miss, looked: Looked) -> Miss:
    """Prefer what the exact stage found; a plain absence leaves the word to the semantic stage."""
    return looked.found if reason is Miss.ABSENT and isinstance(looked.found, Miss) else reason


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
