"""Explaining one call: what the cache would do with it, and why. Asks no backend, counts nothing, changes nothing."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import orjson

from cachestore import Hit, Store
from gateway.load import Loads
from gateway.plan import Plan
from gateway.semantic import Looked, SemanticRoom
from gateway.trust import Trust
from policies.judge import Verdict
from policies.reasons import Miss
from policies.scope import Comparable, comparable, sampling_class

_LONGEST = 500
"""Characters of a text that are shown."""


class Explainer:
    """Puts together what the rooms say."""

    def __init__(self, store: Store, semantic: SemanticRoom | None, trust: Trust | None, loads: Loads) -> None:
        self._store = store
        self._semantic = semantic
        self._trust = trust
        self._loads = loads

    async def document(self, plan: Plan, exact: Hit | None, objection: Miss | None, looked: Looked) -> dict[str, Any]:
        """Return the explanation in JSON's own types; `exact` is what is stored under the key, `objection` what
        speaks against it.
        """
        asked = comparable(plan.call.endpoint, plan.fields) if plan.bypass is None else None
        name = looked.policy.name
        load = self._loads.of(plan.pool)
        return {
            "outcome": _outcome(plan, exact, objection, looked),
            "category": {"name": name, "why": self._why(plan), "probability": self._recognised(plan, looked)},
            "policy": _plain(asdict(looked.policy)),
            "exact": {
                "key": plan.key.hex(),
                "entry": None if exact is None else exact.id,
                "objection": objection,
            },
            "scope": None if asked is None else self._scope(plan, asked, looked),
            "text": None if asked is None else asked.text[:_LONGEST],
            "horizon": looked.horizon.name.lower(),
            "neighbours": await self._neighbours(looked),
            "point": self._point(looked),
            "load": {"level": load.level, "relief": load.relief},
            "budget": None if self._trust is None else self._trust.figures(name),
            "economics": None if self._trust is None else self._trust.stats().get(name, {}).get("economics"),
        }

    def _why(self, plan: Plan) -> str:
        if plan.call.controls.category is not None:
            return "header"
        if plan.decided is not None:
            return "rule" if self._semantic is not None else "fallback"
        return "classifier" if self._semantic is not None and self._semantic.classifies else "fallback"

    def _recognised(self, plan: Plan, looked: Looked) -> float | None:
        if plan.decided is not None or self._semantic is None or looked.vector is None:
            return None
        return self._semantic.recognised(looked.vector)

    def _scope(self, plan: Plan, asked: Comparable, looked: Looked) -> dict[str, Any]:
        fields = asked.fields
        turns = fields.get("messages", fields.get("input"))
        return {
            "hash": looked.scope.hex(),
            "shared_hash": looked.shared_scope.hex(),
            "made_of": {
                "namespace": plan.origin.namespace,
                "endpoint": plan.origin.endpoint,
                "backend": plan.origin.backend,
                "embedder": None if self._semantic is None else self._semantic.embedder,
                "sampling": sampling_class(plan.fields),
                "turns_before": max(0, len(turns) - 1) if isinstance(turns, list) else 0,
                "fields": {name: _short(value) for name, value in fields.items()},
            },
        }

    async def _neighbours(self, looked: Looked) -> list[dict[str, Any]]:
        verdicts = {verdict.candidate.id: verdict for verdict in looked.verdicts}
        found = []
        for neighbour in looked.neighbours:
            verdict = verdicts.get(neighbour.id)
            hit = None if verdict is not None else await self._store.peek(neighbour.id)
            text = verdict.candidate.text if verdict is not None else "" if hit is None else hit.text
            shown = {"entry": neighbour.id, "similarity": neighbour.similarity, "text": text[:_LONGEST]}
            found.append(shown | _said(verdict, refuted=neighbour.id in looked.refuted))
        return found

    def _point(self, looked: Looked) -> dict[str, Any] | None:
        if self._semantic is None:
            return None
        ruling = looked.ruling
        shown = {"judge": self._semantic.point(looked.policy)}
        if ruling is None:
            return shown
        in_force = ruling.point if ruling.point <= 1.0 else None
        return shown | {
            "wanted": ruling.wanted,
            "in_force": in_force,
            "probability": ruling.p,
            "claimed": ruling.claimed,
        }


def _outcome(plan: Plan, exact: Hit | None, objection: Miss | None, looked: Looked) -> dict[str, Any]:
    if plan.bypass is not None:
        return {"would": "bypass", "reason": plan.bypass, "entry": None}
    if exact is not None and objection is None:
        return {"would": "exact-hit", "reason": None, "entry": exact.id}
    if isinstance(looked.found, Hit):
        return {"would": "semantic-hit", "reason": None, "entry": looked.found.id}
    reason = looked.found if objection is None or objection is Miss.ABSENT else objection
    return {"would": "ask-backend", "reason": reason, "entry": None}


def _said(verdict: Verdict | None, *, refuted: bool) -> dict[str, Any]:
    if verdict is None:
        return {"stage": "refuted" if refuted else "not-judged", "accepted": False, "probability": None, "guard": ""}
    return {
        "stage": verdict.stage,
        "accepted": verdict.accepted,
        "probability": verdict.probability,
        "guard": verdict.guard,
    }


def _short(value: Any) -> Any:
    """A field as it is, or the digest of what is long."""
    raw = orjson.dumps(value)
    if len(raw) <= _LONGEST:
        return value
    return f"{len(raw)} bytes, {blake2b(raw, digest_size=8).hexdigest()}"


def _plain(value: Any) -> Any:
    """Infinite numbers are no JSON."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
