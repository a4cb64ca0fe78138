"""The semantic room: embed once, find neighbours in this scope, let the judge decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cachestore import Store
from cachestore.entry import Hit, Neighbour, Vector
from gateway.embedding import Embedder, EmbedderError, Embedding
from gateway.timing import Timing
from policies.canonical import Origin
from policies.category import CategoryPolicy, CategoryTable
from policies.classifier import CategoryHead
from policies.context import Leaning, kept_exact
from policies.controls import Controls, Mode
from policies.freshness import Horizon
from policies.judge import Accepted, Candidate, Judge, Verdict
from policies.reasons import Miss
from policies.scope import Comparable

_LEANS: dict[Leaning, Miss] = {
    Leaning.CONTINUATION: Miss.LEANS_ON_CONTEXT,
    Leaning.ELLIPSIS: Miss.LEANS_ON_CONTEXT,
    Leaning.REFERENCE: Miss.LEANS_ON_CONTEXT,
    Leaning.TOOL_RESULT: Miss.AGENT_STEP,
    Leaning.TRANSCRIPT: Miss.AGENT_STEP,
    Leaning.LOOP: Miss.AGENT_STEP,
    Leaning.LONG: Miss.TEXT_TOO_LONG,
}
_NEIGHBOURS = 4
"""How many neighbours the judge is shown."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of a look-up: the hit or the reason, and what storing a generated answer will need."""

    policy: CategoryPolicy
    found: Hit | Miss
    score: float | None = None
    """The judge's score of the best neighbour."""
    similarity: float | None = None
    """Cosine of the neighbour that the score belongs to, or of the nearest."""
    verdicts: tuple[Verdict, ...] = ()
    """What the judge made of each neighbour it was shown."""
    scope: bytes = b""
    vector: Vector | None = None
    shared_scope: bytes = b""
    """The same scope in the namespace that tenants share; empty where they do not."""
    nearest: Neighbour | None = None
    """The most similar entry, whatever the judge made of it."""
    horizon: Horizon = Horizon.NONE
    """How soon the question says that its answer changes."""


class SemanticRoom:
    """Answers calls whose meaning was asked before."""

    def __init__(
        self,
        embedder: Embedder,
        head: CategoryHead | None,
        store: Store,
        judge: Judge,
        table: CategoryTable,
    ) -> None:
        """`head` is None when it was trained for another embedder; calls are then not classified."""
        self._embedder = embedder
        self._head = head
        self._store = store
        self._judge = judge
        self._table = table

    async def look(
        self,
        origin: Origin,
        asked: Comparable,
        decided: CategoryPolicy | None,
        controls: Controls,
        timing: Timing,
        shared: Origin | None = None,
    ) -> Looked:
        """Look for an answer to a question of the same meaning; failures are misses with a reason.

        `shared` is where the answers lie that tenants share, if they do.
        """
        leaning = kept_exact(origin.endpoint, asked.fields, asked.text)
        if leaning is not None and decided is not None:
            return Looked(decided.under(controls), _LEANS[leaning])
        try:
            embedding = await self._embed(asked.text, timing)
        except EmbedderError as error:
            log.warning("the embedder failed: %s", error)
            return Looked((decided or self._table.fallback()).under(controls), Miss.EMBEDDER_FAILED)
        policy = (decided or self._classify(embedding.vector)).under(controls)
        if policy.mode is not Mode.SEMANTIC:
            return Looked(policy, Miss.ABSENT)
        if leaning is not None:
            return Looked(policy, _LEANS[leaning])
        if embedding.truncated:
            # Two long texts that differ only behind the window would look identical.
            return Looked(policy, Miss.TEXT_TOO_LONG)
        scope = asked.scope(origin, self._embedder.identity)
        shared_scope = asked.scope(shared, self._embedder.identity) if shared is not None else b""
        looked = await self._search((scope, shared_scope), asked.text, embedding.vector, policy, timing)
        return replace(looked, scope=scope, vector=embedding.vector, shared_scope=shared_scope)

    async def _embed(self, text: str, timing: Timing) -> Embedding:
        with timing.room("embed"):
            return await self._embedder.embed(text)

    def _classify(self, vector: Vector) -> CategoryPolicy:
        if self._head is None:
            return self._table.fallback()
        name, _ = self._head.classify(vector)
        return self._table.learned(name)

    async def _search(
        self, scopes: Sequence[bytes], text: str, vector: Vector, policy: CategoryPolicy, timing: Timing
    ) -> Looked:
        scopes = [scope for scope in scopes if scope and self._store.has_scope(scope)]
        if not scopes:
            return Looked(policy, Miss.NO_NEIGHBOUR if self._store.loaded.is_set() else Miss.LOADING)
        with timing.room("search"):
            found = [item for scope in scopes for item in self._store.search(scope, vector, _NEIGHBOURS, -1.0)]
            neighbours = sorted(found, key=lambda item: item.similarity, reverse=True)[:_NEIGHBOURS]
        if not neighbours:
            return Looked(policy, Miss.NO_NEIGHBOUR)
        started = time.perf_counter()
        judged = await self._judged(text, neighbours, policy)
        timing.add("judge", time.perf_counter() - started)
        return replace(judged, nearest=neighbours[0])

    async def _judged(self, text: str, neighbours: Sequence[Neighbour], policy: CategoryPolicy) -> Looked:
        """Show the judge those neighbours that it may accept, with their texts."""
        floor = self._judge.floor(policy)
        near = [item for item in neighbours if item.similarity >= floor]
        if not near:
            nearest = neighbours[0].similarity
            return Looked(policy, Miss.BELOW_THRESHOLD, None, nearest)
        hits = {item.id: hit for item in near if (hit := await self._store.fetch(item.id)) is not None}
        candidates = [Candidate(item.id, hits[item.id].text, item.similarity) for item in near if item.id in hits]
        judgement = await self._judge.judge(text, candidates, policy)
        similarity = candidates[0].similarity if candidates else None
        if isinstance(judgement, Accepted):
            chosen = judgement.candidate
            return Looked(policy, hits[chosen.id], judgement.score, chosen.similarity, judgement.verdicts)
        return Looked(policy, judgement.reason, judgement.score, similarity, judgement.verdicts)
