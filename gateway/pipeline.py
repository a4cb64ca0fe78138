"""The life of one request; the only file that knows the order of the rooms.

plan → exact → (board a flight: semantic → route → generate → admit → store) → answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from random import random
from typing import assert_never

import orjson

from cachestore import Hit, Store
from gateway.answering import Answering, Ride
from gateway.call import Call, exact_key, origin
from gateway.errors import ApiError, BadRequestError, NotCachedError
from gateway.example import Shown, show_example
from gateway.explain import Explainer
from gateway.flight import Flight, Flights, Passenger
from gateway.generation import Generation, backend_request
from gateway.keeping import Keeper, volatility
from gateway.load import Loads
from gateway.metrics import Metrics
from gateway.plan import FlightHead, Found, Generated, Plan, Shared, Streaming
from gateway.refresh import Refreshes
from gateway.responder import JSON, Responder, miss_status
from gateway.semantic import Looked, SemanticRoom
from gateway.timing import Timing
from gateway.trusting import Trusting
from gateway.upstream import Ask, Router
from gateway.wire.pace import Pace
from policies.canonical import digest
from policies.category import CategoryPolicy, CategoryTable, UnknownCategoryError
from policies.controls import Mode
from policies.freshness import Horizon, Serving, serving
from policies.load import Relief
from policies.reasons import Bypass, Miss, NotStored
from policies.scope import comparable
from policies.sharing import SharingRules

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
        sharing: SharingRules | None = None,
        trusting: Trusting | None = None,
        loads: Loads | None = None,
        clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random,
    ) -> None:
        """`semantic` and `trusting` are None when nothing is compared by meaning, `sharing` when tenants share nothing.

        Sizes are in bytes, times in seconds.
        """
        self._store = store
        self._semantic = semantic
        self._router = router
        self._table = table
        self._metrics = metrics
        self._keeper = Keeper(store, metrics, table, sharing, clock, draw)
        self._generation = Generation(self._keeper, metrics, max_answer)
        paces = {name: Pace.of(policy.replay_pace) for name, policy in table.policies.items() if policy.replay_pace}
        self._answering = Answering(metrics, clock, paces)
        self._refreshes = Refreshes()
        self._trusting = trusting
        self._loads = loads or Loads({})
        self._explainer = Explainer(store, semantic, None if trusting is None else trusting.trust, self._loads)
        self._stale_grace = stale_grace
        self._clock = clock
        self._flights = Flights[FlightHead](max_answer, lambda delta: store.charge("streams", delta))
        metrics.watch(store.stats, lambda: len(self._flights))

    async def close(self) -> None:
        """Cancel the generations under way."""
        await self._refreshes.close()
        await self._flights.close()

    def plan(self, call: Call, headers: dict[str, str]) -> Plan:
        """Decide what can be decided at once. Raises UnknownModelError, BadRequestError."""
        pool = self._router.pool(call.model)
        decided = self._decided(call)
        where = origin(call, pool[0].name, headers)
        bypass = _bypass(call, decided)
        key, fields = (b"", {}) if bypass is not None else exact_key(where, call.body)
        if call.caller.shared is None or bypass is not None:
            return Plan(call, pool, decided, bypass, where, key, fields)
        common = replace(where, namespace=call.shared_namespace)
        return Plan(call, pool, decided, bypass, where, key, fields, shared=Shared(common, digest(common, fields)))

    def hot(self, plan: Plan) -> Hit | None:
        """Return the exact answer if it is in memory, fresh and allowed; synchronous: the shortest path."""
        if plan.bypass is not None or plan.call.controls.no_cache:
            return None
        started = time.perf_counter()
        hit = self._store.hot(plan.key)
        if hit is None and plan.shared is not None:
            hit = self._store.hot(plan.shared.key)
        if hit is None or self._objection(hit, plan) is not None:
            return None
        plan.timing.add("exact", time.perf_counter() - started)
        return hit

    async def explain(self, plan: Plan, respond: Responder) -> None:
        """Say what would be done with a call, and why; do nothing."""
        hit, objection = await self._stored(plan) if plan.bypass is None else (None, None)
        looked = await self._look(plan, dry=True) if plan.bypass is None else self._unlooked(plan)
        document = await self._explainer.document(plan, hit, objection, looked)
        await respond.whole(200, [JSON, (b"cache-status", b"hitpath; detail=explain")], orjson.dumps(document))

    async def _stored(self, plan: Plan) -> tuple[Hit | None, Miss | None]:
        """What lies under the key and what speaks against it; counts nothing."""
        id = self._store.known(plan.key)
        if id is None and plan.shared is not None:
            id = self._store.known(plan.shared.key)
        hit = None if id is None else await self._store.peek(id)
        return (None, None) if hit is None else (hit, self._objection(hit, plan))

    def takes_time(self, plan: Plan, hit: Hit) -> bool:
        """Whether a stored answer is sent at a pace: its client may leave meanwhile."""
        return self._answering.paced(plan, hit)

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
        if plan.call.controls.no_cache and self._trusting is not None:
            await self._trusting.corrections.refreshed(plan.key, plan.call.namespace)
        hit, reason = await self._exact(plan)
        if hit is not None and reason is None:
            await self.answer_hit(plan, hit, respond)
            return
        self._keeper.missed(plan.key)
        if hit is not None and reason is Miss.STALE and self._serving(plan, hit) is Serving.REVALIDATE:
            self._refresh(plan)
            await self.answer_hit(plan, hit, respond, detail="stale-while-revalidate")
            return
        reason = reason or Miss.ABSENT
        passenger, joined = self._board(plan, plan)
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

    def _serving(self, plan: Plan, hit: Hit) -> Serving:
        """Say what an answer that may have expired is still good for."""
        controls = plan.call.controls
        policy = plan.decided or self._table.learned(hit.category)
        # Who names an age wants nothing stale, and what changes by itself is not to be served late.
        lax = controls.max_age is None and volatility(plan, Miss.LEANS_ON_CONTEXT) is Horizon.NONE
        return serving(
            self._clock(),
            hit.expires,
            while_revalidate=policy.stale_while_revalidate if lax else 0.0,
            if_error=max(policy.stale_if_error, controls.stale_if_error),
        )

    # --- the rooms --------------------------------------------------------------------------------------------------

    async def _exact(self, plan: Plan) -> tuple[Hit | None, Miss | None]:
        """Return the stored answer and what speaks against it; a cache that fails is a miss with a reason."""
        with plan.timing.room("exact"):
            try:
                hit = await self._store.get(plan.key, grace=self._stale_grace)
                if plan.shared is not None and (hit is None or self._objection(hit, plan) is not None):
                    common = await self._store.get(plan.shared.key, grace=self._stale_grace)
                    if common is not None and (hit is None or self._objection(common, plan) is None):
                        hit = common
            except Exception:
                log.exception("the store failed to look up a key")
                return None, Miss.STORE_FAILED
        return (None, None) if hit is None else (hit, self._objection(hit, plan))

    def _board(self, plan: Plan, flown: Plan) -> tuple[Passenger[FlightHead], bool]:
        """Join the flight of a call, or launch one; `flown` is what it generates."""
        return self._flights.board(
            (plan.key, plan.call.controls.variant()),
            lambda flight: self._generate(flown, flight),
            alone=plan.call.controls.no_cache,
        )

    def _refresh(self, plan: Plan) -> None:
        """Fetch anew in the background what was served stale, unless that is under way or not wanted."""
        controls = plan.call.controls
        if controls.only_if_cached:
            return
        call = replace(plan.call, controls=replace(controls, no_cache=True))
        anew = replace(plan, call=call, timing=Timing())

        async def fetch() -> None:
            passenger, _ = self._board(plan, anew)
            with passenger:
                await passenger.landed()

        self._metrics.refresh("started" if self._refreshes.begin(plan.key, fetch) else "declined")

    async def _look(self, plan: Plan, *, dry: bool = False) -> Looked:
        """Look for an answer of the same meaning; one that is too old for such a question is none."""
        looked = await self._compare(plan, dry=dry)
        looked = replace(looked, horizon=volatility(plan, looked.found))
        if not isinstance(looked.found, Hit):
            return looked
        if (objection := self._objection(looked.found, plan)) is not None:
            return replace(looked, found=objection)
        longest = looked.policy.freshness.ttl(inf, looked.horizon)
        return looked if self._clock() - looked.found.created < longest else replace(looked, found=Miss.VOLATILE)

    async def _compare(self, plan: Plan, *, dry: bool) -> Looked:
        """Ask the semantic room, if this call can be compared at all."""
        decided = plan.decided
        if self._semantic is not None and (decided is None or decided.mode is Mode.SEMANTIC):
            asked = comparable(plan.call.endpoint, plan.fields)
            if asked is not None:
                shared = None if plan.shared is None else plan.shared.origin
                load = Relief(self._loads.of(plan.pool).relief, self._loads.stretch)
                return await self._semantic.look(
                    plan.origin, asked, decided, plan.call.controls, plan.timing, shared=shared, load=load, dry=dry
                )
        return self._unlooked(plan)

    def _unlooked(self, plan: Plan) -> Looked:
        return Looked(plan.decided or self._table.fallback().under(plan.call.controls), Miss.ABSENT)

    async def _generate(self, plan: Plan, flight: Flight[FlightHead]) -> None:
        """Produce a flight: an answer of the same meaning, or a backend's."""
        looked = await self._look(plan)
        if isinstance(looked.found, Hit):
            if self._trusting is not None:
                self._trusting.checks.served(plan, looked, looked.found)
            flight.resolve(Found(looked, looked.found))
            return
        shown = await show_example(self._store, self._router, plan, looked)
        if shown is not None and await self._from_cheaper(shown, flight):
            return
        if plan.call.controls.only_if_cached:
            raise NotCachedError("no fresh answer is stored, and the request said only-if-cached")
        await self._ask(plan, looked, flight)

    async def _from_cheaper(self, shown: Shown, flight: Flight[FlightHead]) -> bool:
        """Answer with the cheaper model's answer, stored or new; says whether it had one."""
        plan, looked = shown.plan, shown.looked
        hit, objection = await self._exact(plan)
        if hit is not None and objection is None:
            flight.resolve(Found(looked, hit, "example"))
            return True
        if plan.call.controls.only_if_cached:
            return False
        self._keeper.missed(plan.key)
        try:
            return await self._ask(plan, looked, flight, only_good=True)
        except ApiError as error:
            if flight.head.done():
                raise
            log.warning("no answer from %s with an example: %s", plan.call.model, error)
            return False

    async def _ask(self, plan: Plan, looked: Looked, flight: Flight[FlightHead], *, only_good: bool = False) -> bool:
        """Ask a backend; with `only_good` an answer that is an error is not passed on, and False is returned."""
        started = time.perf_counter()
        async with self._router.send(plan.pool, backend_request(plan.call)) as (backend, reply):
            if only_good and reply.status != 200:
                return False
            if reply.status == 200 and reply.content_type == "text/event-stream":
                await self._generation.stream(plan, looked, backend, reply, flight, started)
            else:
                flight.resolve(await self._generation.whole(plan, looked, backend, reply, started))
        self._learn(plan, looked, flight, time.perf_counter() - started)
        return True

    def _learn(self, plan: Plan, looked: Looked, flight: Flight[FlightHead], seconds: float) -> None:
        """Tell what a backend's answer shows; the cheaper model's shows nothing of what was not served."""
        head = flight.head.result()
        if self._trusting is None or looked.found is Miss.EXAMPLE or isinstance(head, Found):
            return
        if head.body and (isinstance(head, Streaming) or head.status == 200):
            self._trusting.trust.generated(looked.policy.name, seconds)
            self._trusting.checks.generated(plan, looked, head.body)

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
        usable = stale is not None and self._serving(plan, stale) in (Serving.REVALIDATE, Serving.ON_ERROR)
        fallback = stale if usable else None
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
                self._metrics.hit(plan.call.endpoint, head.detail, head.hit.category, head.hit.cost)
                await self._answering.hit(plan, head.hit, respond, head.detail, head.looked)
            case Generated():
                await self._answering.generated(ride, head)
            case Streaming():
                await self._answering.streaming(ride, head)
            case _:
                assert_never(head)

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
