"""A judge that looks for other instructions first, whatever judge comes after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from policies.category import CategoryPolicy
from policies.instructions import differing
from policies.judge import Candidate, Judge, Judgement, Refused, Stage, Verdict
from policies.reasons import Miss


class WaryJudge:
    """Keeps back candidates that carry other instructions than the question; another judge decides about the rest."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def floor(self, policy: CategoryPolicy) -> float:
        """See Judge.floor."""
        return self._judge.floor(policy)

    def point(self, policy: CategoryPolicy) -> float:
        """See Judge.point."""
        return self._judge.point(policy)

    async def judge(self, text: str, candidates: Sequence[Candidate], policy: CategoryPolicy) -> Judgement:
        """See Judge.judge."""
        found = [(candidate, differing(text, candidate.text)) for candidate in candidates]
        barred = tuple(Verdict(item, Stage.GUARD, False, None, named) for item, named in found if named is not None)
        left = [item for item, named in found if named is None]
        if barred and not left:
            return Refused(Miss.JUDGE_REFUSED, 0.0, barred)
        judgement = await self._judge.judge(text, left, policy)
        return replace(judgement, verdicts=(*judgement.verdicts, *barred)) if barred else judgement

    async def close(self) -> None:
        """See Judge.close."""
        await self._judge.close()
