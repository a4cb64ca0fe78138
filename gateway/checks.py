"""Checks: a share of the hits is asked of the backend too, and its answer compared with the stored one.

All of it happens behind the client's back and never in its way: a bounded number at a time, a bounded number waiting,
nothing while the backends are loaded, and everything cancelled at the end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace

import orjson

from cachestore import Hit, Store
from gateway.comparing import FAILURES, Comparer
from gateway.generation import backend_request
from gateway.load import Loads
from gateway.nearmisses import NearMisses
from gateway.plan import Plan
from gateway.semantic import COMPARED, Looked
from gateway.settings import Price
from gateway.trust import Ruling, Trust
from gateway.trustmetrics import TrustMetrics
from gateway.upstream import Router
from policies.budget import Decision
from policies.reasons import Check

log = logging.getLogger(__name__)

_REST, _LONGEST_REST = 9.0, 1.0
"""How long a turn rests after a comparison, as a multiple of what that took, and in seconds at most."""
_CLEAR = 0.1
"""Labels up to this far from 0 and 1 are counted as right and wrong."""


@dataclass(frozen=True, slots=True)
class CheckRules:
    """What checks may cost."""

    concurrent: int = 2
    waiting: int = 64
    busy_above: float = 0.5
    """Load from which on no hit is checked."""
    timeout: float = 120.0
    """Seconds of one check."""


class Checks:
    """Runs checks in the background and tells the trust what they found."""

    def __init__(
        self,
        trust: Trust,
        comparer: Comparer,
        router: Router,
        loads: Loads,
        store: Store,
        near_misses: NearMisses,
        metrics: TrustMetrics,
        rules: CheckRules,
        prices: Mapping[str, Price],
    ) -> None:
        """`prices` of the upstreams that have one, by name."""
        self._prices = prices
        self._trust = trust
        self._comparer = comparer
        self._router = router
        self._loads = loads
        self._store = store
        self._near_misses = near_misses
        self._metrics = metrics
        self._rules = rules
        self._turns = asyncio.Semaphore(rules.concurrent)
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def served(self, plan: Plan, looked: Looked, hit: Hit) -> None:
        """A hit by meaning goes out: count it, and ask the backend too where its turn has come."""
        ruling = looked.ruling
        if ruling is None:
            return
        self._trust.fetched(ruling.category, looked.fetching, hit.cost, self._price(plan, hit))
        self._trust.served(plan.key, plan.call.namespace, ruling, time.monotonic())
        decision = self._trust.settle(ruling, checks=self._may_ask(plan, hit))
        if decision is not None and decision.check:
            self._begin(lambda: self._shadow(plan, looked, ruling, decision, hit), 2 * COMPARED)

    def generated(self, plan: Plan, looked: Looked, body: bytes) -> None:
        """A backend answered what no candidate was served for: compare the best one's answer for nothing."""
        ruling, stored = looked.ruling, looked.candidate
        if ruling is None or ruling.serve:
            return
        decision = self._trust.settle(ruling, checks=True)
        comparable = stored is not None and len(body) <= COMPARED
        if decision is None or not decision.check or stored is None or not comparable:
            self._near_misses.note(plan.call.namespace, looked, None)
            return
        size = len(stored.body) + len(body)
        if not self._begin(lambda: self._compare(plan, looked, ruling, decision, stored, body), size):
            self._near_misses.note(plan.call.namespace, looked, None)

    def _price(self, plan: Plan, hit: Hit) -> float:
        """What generating the answer would have cost."""
        price = self._prices.get(hit.upstream)
        if price is None:
            return 0.0
        usage = plan.wire.inspect(orjson.loads(hit.body))
        return (usage.prompt_tokens * price.input + usage.completion_tokens * price.output) / 1e6

    def _may_ask(self, plan: Plan, hit: Hit) -> bool:
        """Whether a hit can be checked now. None of this depends on whether it is right."""
        crowded = len(self._tasks) >= self._rules.waiting
        loaded = self._loads.of(plan.pool).level >= self._rules.busy_above
        if crowded:
            self._metrics.check(Check.CROWDED_OUT)
        return not crowded and not loaded and len(hit.body) <= COMPARED

    def _begin(self, work: Callable[[], Coroutine[None, None, None]], size: int) -> bool:
        if len(self._tasks) >= self._rules.waiting:
            self._metrics.check(Check.CROWDED_OUT)
            return False
        task = asyncio.create_task(self._in_turn(work, size))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _in_turn(self, work: Callable[[], Coroutine[None, None, None]], size: int) -> None:
        self._store.charge("checks", size)
        try:
            async with self._turns, asyncio.timeout(self._rules.timeout):
                await work()
        except (*FAILURES, TimeoutError) as error:
            log.debug("a check failed: %s", error)
            self._metrics.check(Check.FAILED)
        except Exception:
            log.exception("a check failed")
            self._metrics.check(Check.FAILED)
        finally:
            self._store.charge("checks", -size)

    async def _shadow(self, plan: Plan, looked: Looked, ruling: Ruling, decision: Decision, hit: Hit) -> None:
        """Ask the backend what the cache has just answered."""
        async with self._router.send(plan.pool, backend_request(_whole(plan).call)) as (_, reply):
            if reply.status != 200:
                self._metrics.check(Check.FAILED)
                return
            body = await reply.read(COMPARED)
        await self._compare(plan, looked, ruling, decision, hit, body)

    async def _compare(
        self, plan: Plan, looked: Looked, ruling: Ruling, decision: Decision, stored: Hit, body: bytes
    ) -> None:
        started = time.monotonic()
        wrong = await self._comparer.wrong(plan, looked.text, looked.policy, stored.body, body)
        busy = time.monotonic() - started
        if wrong is None:
            self._metrics.check(Check.NOT_COMPARABLE)
        else:
            self._metrics.check(_outcome(wrong))
            self._trust.learn(ruling, decision, wrong)
        if not decision.serve:
            self._near_misses.note(plan.call.namespace, looked, wrong)
        # Answers are embedded where clients' questions are: the turn is kept for a while, so that questions come first.
        await asyncio.sleep(min(_LONGEST_REST, _REST * busy))


def _outcome(wrong: float) -> Check:
    if wrong <= _CLEAR:
        return Check.RIGHT
    return Check.WRONG if wrong >= 1.0 - _CLEAR else Check.UNCLEAR


def _whole(plan: Plan) -> Plan:
    """The same call, asking for no stream: nobody waits for its first words."""
    call = plan.call
    if not call.stream:
        return plan
    body = {name: value for name, value in call.body.items() if name not in ("stream", "stream_options")}
    return replace(plan, call=replace(call, body=body, raw=orjson.dumps(body)))
