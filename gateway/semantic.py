"""The semantic room: embed once, find neighbours in this scope, let the judge decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cachestore import Store
from cachestore.entry import Hit, Neighbour, Vector
from gateway.embedding import Embedder, EmbedderError, Embedding
from gateway.timing import Timing
from gateway.trust import Ruling, Trust
from policies.budget import RUNGS
from policies.canonical import Origin
from policies.category import CategoryPolicy, CategoryTable
from policies.classifier import CategoryHead
from policies.context import Leaning, kept_exact
from policies.controls import Controls, Mode
from policies.freshness import Horizon
from policies.judge import Accepted, Candidate, Judge, Judgement, Refused, Verdict
from policies.load import NO_RELIEF, Relief, relaxed
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
_NOT_COMPARED = frozenset({*_LEANS.values(), Miss.ABSENT, Miss.NOT_WORTH_IT, Miss.REFRESH, Miss.EMBEDDER_FAILED})
"""Calls that never came to be compared."""
COMPARED = 64 * 2**10
"""Bytes of an answer that is compared with another."""
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
    text: str = ""
    """What was compared."""
    neighbours: tuple[Neighbour, ...] = ()
    """All that were found, most similar first."""
    refuted: frozenset[int] = frozenset()
    """Those of them whose pair with this question was found wrong before."""
    ruling: Ruling | None = None
    """What is thought of the best candidate; None where none was scored."""
    candidate: Hit | None = None
    """The best candidate where it is not served: its answer is compared with the backend's."""
    fetching: float = 0.0
    """Seconds that reading the candidates took."""


class SemanticRoom:
    """Answers calls whose meaning was asked before."""

    def __init__(
        self,
        embedder: Embedder,
        head: CategoryHead | None,
        store: Store,
        judge: Judge,
        table: CategoryTable,
        trust: Trust | None = None,
    ) -> None:
        """`head` is None when it was trained for another embedder; calls are then not classified. Without `trust` the
        judge's word is taken.
        """
        self._embedder = embedder
        self._head = head
        self._store = store
        self._judge = judge
        self._table = table
        self._trust = trust

    @property
    def embedder(self) -> str:
        """The embedder's identity."""
        return self._embedder.identity

    @property
    def classifies(self) -> bool:
        """Whether categories are recognised by what a question says."""
        return self._head is not None

    def recognised(self, vector: Vector) -> float | None:
        """Return how sure the classifier is of the category that it recognises."""
        return None if self._head is None else self._head.classify(vector)[1]

    def point(self, policy: CategoryPolicy) -> float:
        """Return the judge's own acceptance point."""
        return self._judge.point(policy)

    async def look(
        self,
        origin: Origin,
        asked: Comparable,
        decided: CategoryPolicy | None,
        controls: Controls,
        timing: Timing,
        shared: Origin | None = None,
        load: Relief = NO_RELIEF,
        dry: bool = False,
    ) -> Looked:
        """Look for an answer to a question of the same meaning; failures are misses with a reason.

        `shared` is where the answers lie that tenants share, if they do; `load` what the backends' load lets give way;
        `dry` counts nothing.
        """
        started = time.perf_counter()
        looked = await self._look(origin, asked, decided, controls, timing, shared, load, dry)
        if self._trust is not None and not dry and looked.found not in _NOT_COMPARED:
            self._trust.looked(looked.policy.name, time.perf_counter() - started, hit=isinstance(looked.found, Hit))
        return looked

    async def _look(
        self,
        origin: Origin,
        asked: Comparable,
        decided: CategoryPolicy | None,
        controls: Controls,
        timing: Timing,
        shared: Origin | None,
        load: Relief,
        dry: bool,
    ) -> Looked:
        leaning = kept_exact(origin.endpoint, asked.fields, asked.text)
        if leaning is not None and decided is not None:
            return Looked(decided.under(controls), _LEANS[leaning])
        if decided is not None and not controls.no_cache and not self._worth(decided, dry):
            return Looked(decided.under(controls), Miss.NOT_WORTH_IT)
        try:
            embedding = await self._embed(asked.text, timing)
        except EmbedderError as error:
            log.warning("the embedder failed: %s", error)
            return Looked((decided or self._table.fallback()).under(controls), Miss.EMBEDDER_FAILED)
        policy = load.stretched(decided or self._classify(embedding.vector)).under(controls)
        if policy.mode is not Mode.SEMANTIC:
            return Looked(policy, Miss.ABSENT)
        if leaning is not None:
            return Looked(policy, _LEANS[leaning])
        if embedding.truncated:
            # Two long texts that differ only behind the window would look identical.
            return Looked(policy, Miss.TEXT_TOO_LONG)
        scope = asked.scope(origin, self._embedder.identity)
        shared_scope = asked.scope(shared, self._embedder.identity) if shared is not None else b""
        if controls.no_cache:
            looked = Looked(policy, Miss.REFRESH)
        elif decided is None and not self._worth(policy, dry):
            looked = Looked(policy, Miss.NOT_WORTH_IT)
        else:
            looked = await self._search(
                (scope, shared_scope), asked.text, embedding.vector, policy, timing, load.relief, dry
            )
        return replace(looked, scope=scope, vector=embedding.vector, shared_scope=shared_scope, text=asked.text)

    def _worth(self, policy: CategoryPolicy, dry: bool) -> bool:
        if self._trust is None:
            return True
        return not self._trust.skipping(policy.name) if dry else self._trust.worth(policy.name)

    async def _embed(self, text: str, timing: Timing) -> Embedding:
        with timing.room("embed"):
            return await self._embedder.embed(text)

    def _classify(self, vector: Vector) -> CategoryPolicy:
        if self._head is None:
            return self._table.fallback()
        name, _ = self._head.classify(vector)
        return self._table.learned(name)

    async def _search(
        self,
        scopes: Sequence[bytes],
        text: str,
        vector: Vector,
        policy: CategoryPolicy,
        timing: Timing,
        relief: float,
        dry: bool,
    ) -> Looked:
        known = [scope for scope in scopes if scope and self._store.has_scope(scope)]
        if not known:
            return Looked(policy, Miss.NO_NEIGHBOUR if self._store.loaded.is_set() else Miss.LOADING)
        with timing.room("search"):
            found = [item for scope in known for item in self._store.search(scope, vector, _NEIGHBOURS, -1.0)]
            neighbours = sorted(found, key=lambda item: item.similarity, reverse=True)[:_NEIGHBOURS]
        if not neighbours:
            return Looked(policy, Miss.NO_NEIGHBOUR)
        started = time.perf_counter()
        judged = await self._judged(scopes[0], text, neighbours, policy, relief, dry)
        timing.add("judge", time.perf_counter() - started)
        return replace(judged, nearest=neighbours[0], neighbours=tuple(neighbours))

    async def _judged(
        self, scope: bytes, text: str, neighbours: Sequence[Neighbour], policy: CategoryPolicy, relief: float, dry: bool
    ) -> Looked:
        """Show the judge those neighbours that it may accept, with their texts."""
        floor = self._judge.floor(policy)
        near = [item for item in neighbours if item.similarity >= floor]
        if not near:
            nearest = neighbours[0].similarity
            return Looked(policy, Miss.BELOW_THRESHOLD, None, nearest)
        started = time.perf_counter()
        fetch = self._store.peek if dry else self._store.fetch
        hits = {item.id: hit for item in near if (hit := await fetch(item.id)) is not None}
        fetching = (time.perf_counter() - started) / len(near)
        candidates = [Candidate(item.id, hits[item.id].text, item.similarity) for item in near if item.id in hits]
        if self._trust is None:
            return _believed(policy, hits, candidates, await self._judge.judge(text, candidates, policy))
        pairs = self._trust.unrefuted(scope, text, candidates)
        open_ = [candidate for candidate in candidates if candidate.id in pairs]
        refuted = frozenset(hits) - frozenset(pairs)
        if refuted and not open_:
            return Looked(policy, Miss.REFUTED, None, candidates[0].similarity, refuted=refuted)
        judgement = await self._judge.judge(text, open_, policy)
        wanted = relaxed(self._judge.point(policy), RUNGS[0], relief, policy.max_relax)
        ruling = self._trust.rule(policy, judgement, pairs, wanted)
        looked = replace(_ruled(self._trust, policy, hits, judgement, ruling), refuted=refuted, fetching=fetching)
        return (
            replace(looked, similarity=candidates[0].similarity) if looked.similarity is None and candidates else looked
        )


def _believed(
    policy: CategoryPolicy, hits: Mapping[int, Hit], candidates: Sequence[Candidate], judgement: Judgement
) -> Looked:
    """The judge's word as it is."""
    if isinstance(judgement, Accepted):
        chosen = judgement.candidate
        return Looked(policy, hits[chosen.id], judgement.score, chosen.similarity, judgement.verdicts)
    similarity = candidates[0].similarity if candidates else None
    return Looked(policy, judgement.reason, judgement.score, similarity, judgement.verdicts)


def _ruled(
    trust: Trust, policy: CategoryPolicy, hits: Mapping[int, Hit], judgement: Judgement, ruling: Ruling | None
) -> Looked:
    """The judge's word, and what is thought of it."""
    if ruling is None:
        reason = judgement.reason if isinstance(judgement, Refused) else Miss.JUDGE_REFUSED
        return Looked(policy, reason, judgement.score, None, judgement.verdicts)
    verdict = next(item for item in judgement.verdicts if item.candidate.id == ruling.entry)
    hit = hits[ruling.entry]
    looked = Looked(policy, hit, ruling.p, verdict.candidate.similarity, judgement.verdicts, ruling=ruling)
    if ruling.serve:
        return looked
    candidate = hit if len(hit.body) <= COMPARED else None
    return replace(looked, found=trust.reason(ruling, judgement), candidate=candidate)
