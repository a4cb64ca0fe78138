"""The judge with a trained eye: equal normal forms pass, guards refuse, the pair model decides about the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from gateway.judge.model import PairModel
from policies import guards
from policies.category import CategoryPolicy
from policies.facts import Facts, facts
from policies.judge import Accepted, Candidate, Judgement, Refused, Stage, Verdict
from policies.normalise import normal
from policies.pairhead import PairHead
from policies.reasons import Miss

MAX_WAITING = 256
"""Judgements that may wait for the thread; one more is a miss."""
_REFUSED = 0.0
"""Score of a pair that a guard refuses, or that is not judged."""

Point = Callable[[CategoryPolicy], float]


class PairJudge:
    """Judges on a thread of its own, so that the event loop goes on."""

    def __init__(self, model: PairModel, head: PairHead, *, cosine: bool, point: Point | None = None) -> None:
        """`cosine`: the similarities are those of the local embedder. `point` replaces the head's acceptance point."""
        self._model = model
        self._head = head
        self._cosine = cosine
        self._point = point
        self._thread = ThreadPoolExecutor(1, "hitpath-judge")
        self._waiting = 0

    def floor(self, policy: CategoryPolicy) -> float:
        """Return the category's threshold: what is less similar is not worth judging."""
        return policy.threshold

    def point(self, policy: CategoryPolicy) -> float:
        """Return the probability from which a candidate is accepted."""
        return self._head.point(policy.error_budget, policy.name) if self._point is None else self._point(policy)

    async def judge(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """Decide; the score is the probability that the stored answer serves."""
        if not candidates:
            return Refused(Miss.NO_NEIGHBOUR, -1.0)
        if self._waiting >= MAX_WAITING:
            return Refused(Miss.JUDGE_BUSY, _REFUSED)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self.decide, text, candidates, policy)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Finish what was begun and end the thread."""
        await asyncio.to_thread(self._thread.shutdown)

    def decide(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """The same, synchronously: the nearest candidate by itself, the others together if it will not do."""
        form = normal(text)
        for candidate in candidates:
            if form and normal(candidate.text) == form:
                return Accepted(candidate, 1.0, (Verdict(candidate, Stage.SAME, True, 1.0),))
        asked, point = facts(text), self.point(policy)
        verdicts: list[Verdict] = []
        for group in (candidates[:1], candidates[1:]):
            verdicts += self._verdicts(text, asked, group, policy.name, point)
            best = max(verdicts, key=lambda verdict: verdict.probability or _REFUSED)
            if best.accepted:
                return Accepted(best.candidate, best.probability or _REFUSED, tuple(verdicts))
        return Refused(Miss.JUDGE_REFUSED, best.probability or _REFUSED, tuple(verdicts))

    def _verdicts(
        self, text: str, asked: Facts, candidates: Sequence[Candidate], category: str, point: float
    ) -> list[Verdict]:
        known = [facts(candidate.text) for candidate in candidates]
        conflicts = [guards.conflict(asked, stored) for stored in known]
        left = [place for place, found in enumerate(conflicts) if found is None]
        logits = dict(zip(left, self._model.logits(text, [candidates[place].text for place in left]), strict=True))
        verdicts = []
        for place, candidate in enumerate(candidates):
            logit = logits.get(place)
            if (found := conflicts[place]) is not None:
                verdicts.append(Verdict(candidate, Stage.GUARD, False, _REFUSED, str(found)))
            elif logit is None:
                verdicts.append(Verdict(candidate, Stage.DECLINED, False))
            else:
                cosine = candidate.similarity if self._cosine else None
                probability = self._head.probability(logit, cosine, category)
                verdicts.append(Verdict(candidate, Stage.PAIR, probability >= point, probability))
        return verdicts
