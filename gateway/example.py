"""Near answers as examples: the call becomes a cheaper model's, with a stored question and answer in front.

Opt-in by category (`example`). What comes back is kept as what it is: the cheaper model's answer to the call with the
example in it, under that call's own key and in no scope, so it is never found as an answer of the model asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import orjson

from cachestore import Hit, Store
from gateway.call import exact_key
from gateway.plan import Plan
from gateway.semantic import Looked
from gateway.upstream import Router
from gateway.wire.spoken import spoken
from policies.examples import ExampleRules, with_example
from policies.reasons import Miss


@dataclass(frozen=True, slots=True)
class Shown:
    """A call as the cheaper model gets it."""

    plan: Plan
    looked: Looked


async def show_example(store: Store, router: Router, plan: Plan, looked: Looked) -> Shown | None:
    """Return the call for the cheaper model; None where the category has none or nothing near enough is stored."""
    rules = looked.policy.example
    if rules is None or plan.call.endpoint != "chat" or plan.call.controls.no_cache:
        return None
    near = looked.nearest
    if isinstance(looked.found, Hit) or near is None or near.similarity < rules.similarity:
        return None
    stored = await store.fetch(near.id)
    if stored is None or stored.endpoint != "chat":
        return None
    body = _body(plan, stored, rules)
    return None if body is None else _shown(router, plan, looked, body)


def _body(plan: Plan, stored: Hit, rules: ExampleRules) -> dict[str, Any] | None:
    answer = orjson.loads(stored.body)
    choice = answer["choices"][0]
    if choice.get("message", {}).get("tool_calls"):
        # A call of a tool without its result is no example of an answer.
        return None
    return with_example(plan.call.body, stored.text, spoken("chat", {"choices": [choice]}), rules.model)


def _shown(router: Router, plan: Plan, looked: Looked, body: dict[str, Any]) -> Shown:
    call = replace(plan.call, body=body, raw=orjson.dumps(body))
    pool = router.pool(call.model)
    where = replace(plan.origin, backend=pool[0].name)
    key, fields = exact_key(where, body)
    own = replace(plan, call=call, pool=pool, origin=where, key=key, fields=fields, shared=None)
    seen = replace(looked, found=Miss.EXAMPLE, scope=b"", shared_scope=b"", vector=None)
    return Shown(own, seen)
