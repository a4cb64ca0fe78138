"""Keeping: whether a whole answer is stored, for how long, and for whom.

Only what a backend has generated comes here; nothing else writes entries. An answer is the asking tenant's own. Where
tenants share (`cache.shared`), it enters the common namespace once enough of them got agreeing answers on their own,
and never if personal data is found in the question or in the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from cachestore import Document, Store
from gateway.metrics import Metrics
from gateway.plan import Plan
from gateway.semantic import Looked
from gateway.wire.spoken import spoken, strings
from policies.admission import admit, lifetime
from policies.category import CategoryPolicy, CategoryTable
from policies.freshness import Horizon, Sightings, horizon
from policies.personal import Handling, personal
from policies.reasons import Miss, NotStored
from policies.scope import comparable
from policies.sharing import Confirmations, Confirmed, SharingRules, gist

log = logging.getLogger(__name__)

_EARLIER_TURNS = 3
"""User turns before one that leans on them which are read for relative times."""
_SCANNED_HERE = 20_000
"""Characters up to which a text is searched for personal data on the event loop: about ten milliseconds."""
_SCANNED_AT_ALL = 500_000
"""Longer texts count as personal."""


def volatility(plan: Plan, found: object) -> Horizon:
    """Return how soon the question says that its answer changes; vectors never do. `found`: what the look-up found."""
    said = plan.call.said
    if plan.call.endpoint == "embeddings" or found is Miss.AGENT_STEP or not said:
        return Horizon.NONE
    # "And in Germany?" changes as soon as what it leans on.
    turns = said[-1 - _EARLIER_TURNS :] if found is Miss.LEANS_ON_CONTEXT else said[-1:]
    return max(map(horizon, turns))


def _asked(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the caller's users said; instructions are the application's own, and whoever shares has sent them."""
    for name in ("messages", "input", "prompt"):
        value = fields.get(name)
        for item in value if isinstance(value, list) else [value]:
            if not (isinstance(item, dict) and item.get("role") in ("system", "developer")):
                yield from strings(item)


class Keeper:
    """Decides about finished answers and commits those that are kept."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        table: CategoryTable,
        sharing: SharingRules | None,
        clock: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        """`sharing` is None where no tenant shares; `draw` gives numbers uniform in [0, 1)."""
        self._store = store
        self._metrics = metrics
        self._table = table
        self._clock = clock
        self._draw = draw
        counts = any(policy.admit_after > 1 for policy in table.policies.values())
        self._sightings = Sightings() if counts else None
        self._confirmations = None if sharing is None else Confirmations(sharing)

    def missed(self, key: bytes) -> None:
        """Count a call that the cache could not answer."""
        if self._sightings is not None:
            self._sightings.missed(key)

    def promise(self, plan: Plan, looked: Looked) -> NotStored | None:
        """Say why an answer will not be kept, whatever it is; None promises nothing about its own faults."""
        return self._admitted(plan, looked, None)

    async def keep(
        self, plan: Plan, looked: Looked, backend: str, answer: Any, body: bytes, seconds: float
    ) -> int | NotStored:
        """Admit a whole answer and store it; returns its id when it is durable, or says why it is not kept."""
        refusal = plan.wire.inspect(answer).refusal if isinstance(answer, dict) else NotStored.MALFORMED
        refused = self._admitted(plan, looked, refusal)
        if refused is None:
            kept = await self._store_for(plan, looked, backend, answer, body, seconds)
            if not isinstance(kept, NotStored):
                return kept
            refused = kept
        self._metrics.not_stored(refused)
        return refused

    def _admitted(self, plan: Plan, looked: Looked, refusal: NotStored | None) -> NotStored | None:
        missed = 1 if self._sightings is None else self._sightings.seen(plan.key)
        return admit(refusal, looked.policy, plan.call.controls, horizon=looked.horizon, missed=missed)

    async def _store_for(
        self, plan: Plan, looked: Looked, backend: str, answer: dict[str, Any], body: bytes, seconds: float
    ) -> int | NotStored:
        said = spoken(plan.call.endpoint, answer)
        private = await self._is_personal(plan, looked.policy, said)
        if private and looked.policy.personal is Handling.NEVER:
            return NotStored.PERSONAL
        document = self._document(plan, looked, backend, body, seconds)
        if plan.shared is not None and not private and self._is_confirmed(plan, said):
            document = replace(
                document,
                key=plan.shared.key,
                scope=looked.shared_scope,
                namespace=plan.shared.origin.namespace,
                # What one tenant asks for must not outlive what the operator allows the others.
                expires=min(document.expires, document.created + self._table.learned(looked.policy.name).ttl),
                vector=looked.vector if looked.shared_scope else None,
            )
        return await self._put(document)

    async def _is_personal(self, plan: Plan, policy: CategoryPolicy, said: str) -> bool:
        """Look for personal data where finding some would change anything."""
        if plan.shared is None and policy.personal is Handling.PRIVATE:
            return False
        text = "\n".join((*_asked(plan.fields), said))
        if len(text) > _SCANNED_AT_ALL:
            return True
        found = personal(text) if len(text) <= _SCANNED_HERE else await asyncio.to_thread(personal, text)
        self._metrics.personal(found)
        return bool(found)

    def _is_confirmed(self, plan: Plan, said: str) -> bool:
        if self._confirmations is None or plan.shared is None:
            return False
        before = self._confirmations.bytes
        tenant = plan.call.caller.namespace.encode()
        verdict = self._confirmations.offer(plan.shared.key, tenant, gist(said), self._clock())
        self._store.charge("sharing", self._confirmations.bytes - before)
        confirmed = isinstance(verdict, Confirmed)
        self._metrics.shared(confirmed=confirmed)
        return confirmed

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
            expires=now + lifetime(looked.policy, plan.call.controls, looked.horizon, self._draw()),
            cost=seconds,
            vector=looked.vector if looked.scope else None,
        )

    async def _put(self, document: Document) -> int | NotStored:
        try:
            return await self._store.put(document)
        except Exception:
            log.exception("the store failed to keep an answer")
            return NotStored.STORE_FAILED
