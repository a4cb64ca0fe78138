"""The life of one request; the only file that knows the order of the rooms.

plan → exact → (board a flight: semantic → route → generate → admit → store) → answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import assert_never

from cachestore import Hit, Store
from gateway.answering import Answering, Ride
from gateway.call import Call, exact_key, origin
from gateway.errors import ApiError, BadRequestError, NotCachedError
from gateway.flight import Flight, Flights, Passenger
from gateway.generation import Generation, backend_request
from gateway.metrics import Metrics
from gateway.plan import FlightHead, Found, Generated, Plan, Streaming
from gateway.responder import Responder, miss_status
from gateway.semantic import Looked, SemanticRoom
from gateway.upstream import Ask, Router
from policies.category import CategoryPolicy, CategoryTable, UnknownCategoryError
from policies.controls import Mode
from policies.reasons import Bypass, Miss, NotStored
from policies.scope import comparable

log = logging.getLogger(__name__)


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
        self._generation = Generation(store, metrics, max_answer, clock)
        self._answering = Answering(metrics, clock)
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
        kind = "stale" if detail.startswith("stale") else detail
        self._metrics.hit(plan.call.endpoint, kind, hit.category, hit.cost)
        await self._answering.hit(plan, hit, respond, detail, None)

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
        async with self._router.send(plan.pool, backend_request(plan.call)) as (backend, reply):
            if reply.status == 200 and reply.content_type == "text/event-stream":
                await self._generation.stream(plan, looked, backend, reply, flight, started)
            else:
                flight.resolve(await self._generation.whole(plan, looked, backend, reply, started))

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
        if not isinstance(head, Found):
            reason = _reason(reason, head.looked)
            self._metrics.miss(plan.call.endpoint, reason, collapsed=joined)
        ride = Ride(plan, passenger, respond, reason, joined)
        match head:
            case Found():
                self._metrics.hit(plan.call.endpoint, "semantic", head.hit.category, head.hit.cost)
                await self._answering.hit(plan, head.hit, respond, "semantic", head.looked)
            case Generated():
                await self._answering.generated(ride, head)
            case Streaming():
                await self._answering.streaming(ride, head)
            case _:
                assert_never(head)

    def _may_serve_stale(self, plan: Plan, stale: Hit) -> bool:
        accepted = plan.call.controls.stale_if_error
        return accepted > 0 and self._clock() - stale.expires <= accepted

    async def _forward(self, plan: Plan, reason: Bypass, respond: Responder) -> None:
        """Pass a call through, neither read nor stored."""
        call = plan.call
        ask = Ask("POST", call.path, call.query, call.headers, call.raw, call.namespace)
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


def _reason(reason: Miss, looked: Looked) -> Miss:
    """Prefer what the exact stage found; a plain absence leaves the word to the semantic stage."""
    return looked.found if reason is Miss.ABSENT and isinstance(looked.found, Miss) else reason
