"""How wrong a stored answer is, seen from the backend's own: by words, by similarity, by a model, by the judge."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import orjson

from gateway.embedding import Embedder, EmbedderError
from gateway.errors import ApiError
from gateway.plan import Plan
from gateway.upstream import Ask, Router
from gateway.wire.spoken import spoken
from policies.agreement import between, brief, by_similarity, by_words
from policies.category import CategoryPolicy
from policies.judge import Candidate, Judge, Stage

log = logging.getLogger(__name__)

_VERDICT_BYTES = 2**20
_NOT_THEIRS = frozenset({b"content-length", b"content-type", b"accept-encoding", b"cache-control", b"accept"})
_PROMPT = (
    "Two assistants answered the same question. Decide whether the first answer can be given in place of the second: "
    "no fact, figure, name or recommendation that matters to the question may differ; wording, order and detail may. "
    "Reply with the single word yes or no."
)


class Comparer:
    """Compares two answers to one question."""

    def __init__(self, embedder: Embedder, judge: Judge, router: Router, model: str | None) -> None:
        """`model` is asked where words and similarity do not tell; None: the judge is."""
        self._embedder = embedder
        self._judge = judge
        self._router = router
        self._model = model

    async def wrong(
        self, plan: Plan, question: str, policy: CategoryPolicy, stored: bytes, fresh: bytes
    ) -> float | None:
        """Return how wrong the stored answer is, 0 to 1; None where the two cannot be compared.

        Both are bodies of whole answers. Raises EmbedderError, ApiError.
        """
        said = [self._said(plan, body) for body in (stored, fresh)]
        if said[0] is None or said[1] is None:
            return None
        one, two = said[0], said[1]
        found = by_words(one, two)
        if found is not None:
            return found
        cosine = await self._cosine(one, two)
        found = by_similarity(one, two, cosine)
        if found is None and self._model is not None:
            found = await self._asked(plan, self._model, question, one, two)
        if found is None:
            found = await self._judged(one, two, cosine, policy)
        return between(one, two, cosine) if found is None else found

    def _said(self, plan: Plan, body: bytes) -> str | None:
        """What a whole answer says; None if it is not whole."""
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(answer, dict) or plan.wire.inspect(answer).refusal is not None:
            return None
        return spoken(plan.call.endpoint, answer) or None

    async def _cosine(self, one: str, two: str) -> float:
        first, second = [(await self._embedder.embed(text)).vector for text in (one, two)]
        return float(first @ second)

    async def _judged(self, one: str, two: str, cosine: float, policy: CategoryPolicy) -> float | None:
        """Let the judge of questions compare the answers, if they are as short as questions; None where it does not."""
        if not brief(one, two):
            return None
        judgement = await self._judge.judge(two, [Candidate(0, one, cosine)], policy)
        verdict = judgement.verdicts[0] if judgement.verdicts else None
        if verdict is None or verdict.probability is None or verdict.stage is Stage.DECLINED:
            return None
        return 1.0 - verdict.probability

    async def _asked(self, plan: Plan, model: str, question: str, one: str, two: str) -> float | None:
        """Ask a backend's model; None where it says neither yes nor no."""
        text = f"Question:\n{question}\n\nFirst answer:\n{one}\n\nSecond answer:\n{two}"
        turns = [{"role": "system", "content": _PROMPT}, {"role": "user", "content": text}]
        body = orjson.dumps({"model": model, "messages": turns, "temperature": 0})
        headers = [item for item in plan.call.headers if item[0] not in _NOT_THEIRS and not item[0].startswith(b"x-")]
        headers += [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]
        ask = Ask("POST", "/chat/completions", "", headers, body, plan.call.namespace)
        async with self._router.send(self._router.pool(model), ask) as (_, reply):
            raw = await reply.read(_VERDICT_BYTES)
            return _yes_or_no(raw) if reply.status == 200 else None


def _yes_or_no(raw: bytes) -> float | None:
    try:
        answer: Any = orjson.loads(raw)
        words: Sequence[str] = answer["choices"][0]["message"]["content"].lower().split()
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        return None
    said = words[-1].strip(".!*\"'") if words else ""
    return {"yes": 0.0, "no": 1.0}.get(said)


FAILURES = (EmbedderError, ApiError)
"""What a comparison may end with."""
