"""Error budgets: how sure the judge has to be, kept online from checked answers.

The judge gives each candidate a probability that its answer serves the new question. A *rung* is one such probability;
a category serves everything from one rung on, its acceptance point. Which rungs may be served is tested, not believed:

- **Labels.** A share of the hits is checked: the backend is asked too, and the two answers are compared. What is not
  served goes to the backend anyway, so there every candidate is checked at no more than the price of the comparison. A
  label says how wrong the stored answer was, from 0 to 1.
- **Capital.** Each rung holds a bet against "what lies above me is wrong more often than the target": a capital that
  starts at 1, grows with right labels and shrinks with wrong ones, by `1 + bet * (target - wrong)`. As long as the
  hypothesis is true, that is a supermartingale, so it ever reaches `2 / risk` with probability at most `risk / 2`
  (Ville's inequality; testing by betting: Waudby-Smith and Ramdas, arXiv 2010.09686, section 4).
- **Chains.** A rung is served only if all stricter ones of its chain are open too: fixed-sequence testing (Learn then
  Test, arXiv 2110.01052, section 4.2), which needs no correction for the number of rungs. Two chains have half the risk
  each: one from the strictest rung that enough candidates reach, one from where the judge claims to keep the budget.
  Where they begin is chosen from the judge's claims only, without any label.

What follows, as long as questions of a category and their labels are exchangeable: the chance that a rung whose true
error is above the target is served before the first restart is at most `risk`. All hits are checked with one share, and
the rest always, so labels need no weights: above a rung that keeps the target, the extra labels only make a laxer one
look worse than it is. The judge need not be calibrated for this; a bad judge costs hits, not errors.

A category may begin otherwise: with a `start` the judge's word is taken for the rungs from there on, with the capital
that would have opened them, and the first wrong labels close them. Then the guarantee holds only from the first closing
on; before it, it is as good as the pairs on which the judge was calibrated.

Traffic changes, and then nothing is exchangeable. So capital is held between a floor and a ceiling: good years are no
licence, two or three wrong labels close a rung, and bad years do not forbid a return: what is not served is checked for
nothing, by which a category finds back alone. From the floor, chance opens a rung beyond the target with probability
at most `risk / 2 * exp(-depth)`. Beside that an account is kept of the wrong hits that the budget still allows; the
share of checked hits follows it, and an account overdrawn by more than its credit closes the rungs at once.

The test keeps the target on average, the budget is counted. What is counted is lost most easily at the beginning: one
wrong hit among the first `1 / budget` breaks it, and when the traffic changes just then, nothing earns it back. So
while less than one wrong hit is saved up, the point keeps a guard of some rungs above what is allowed: what lies
between goes to the backend and is compared for nothing, and a change is seen there before it is served. A broken
budget needs right hits, so in debt the guard is lifted; so it is by a long row of right labels, or a category whose
candidates all score alike would be guarded for ever.

Nothing here knows a clock or draws at random; a look-up costs about a microsecond, a label about fifteen.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

RUNGS = tuple(1.0 / (1.0 + math.exp(-0.5 * step)) for step in range(33))
"""Acceptance points, laxest first, from .5 to 1 - 1e-7: also what a judge far too sure of itself says is told apart."""
NEVER = math.inf
"""The acceptance point of a category that serves nothing by meaning."""

_LUCK = 2.0
"""Standard errors of `horizon` hits that the target stays clear of the budget."""
_CLEAN = 3.0
"""Right labels in a row that lift the guard, as a multiple of `1 / budget`."""
_LEAST_BET, _LARGEST_BET = 0.5, 0.9
_WRONG = 0.25
"""From this label on a row of right ones ends; a refresh within seconds weighs as much."""
_FORGET = 0.25
"""A rung's own error rate, from which its bets follow, reaches back over 4 / target labels."""
_BELIEF = 0.2
"""What a rung's error rate is taken for before there are labels, as a share of the target."""


@dataclass(frozen=True, slots=True)
class BudgetRules:
    """How one category's error budget is kept."""

    budget: float = 0.01
    """Accepted share of wrong answers among hits by meaning; 0 serves nothing."""
    risk: float = 0.05
    """Accepted chance that a point beyond the budget is served although the traffic stays as it is."""
    horizon: int = 5000
    """Hits over which the budget is to hold when they are counted; fewer mean more caution."""
    shadow_min: float = 0.05
    """Share of the hits that is always checked."""
    shadow_max: float = 1.0
    """Share that is checked while little is saved up."""
    watch: float = 4.0
    """Errors of the account that are to be observed before it is used up: more means more checks."""
    credit: float = 3.0
    """Wrong hits by which the account may be overdrawn: the first error seen need not close a category."""
    guard: int = 2
    """Rungs that the point keeps above what is allowed while the next wrong hit would break the budget; 0: none."""
    savings_max: float = 40.0
    """Wrong hits that can be saved up at most."""
    material: float = 0.2
    """Share of all candidates that must reach a rung where a chain may begin."""
    trust: float = 0.8
    """The second chain begins where the judge claims an error of at most this share of the target."""
    warmup: int = 64
    """Candidates seen before the chains are laid."""
    drop: float = 1.5
    """How far a rung's log capital may fall below what opened it before it closes."""
    room: float = 0.5
    """How far it may rise above that."""
    depth: float = 1.5
    """How far below zero it may sink."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.budget < 1.0 and 0.0 < self.risk < 1.0):
            raise ValueError("budget must lie in [0, 1), risk in (0, 1)")
        if not 0.0 < self.shadow_min <= self.shadow_max <= 1.0:
            raise ValueError("0 < shadow_min <= shadow_max <= 1 must hold")
        if min(self.horizon, self.warmup, self.watch, self.savings_max, self.drop) <= 0:
            raise ValueError("horizon, warmup, watch, savings_max and drop must be positive")
        if min(self.credit, self.guard, self.room, self.depth) < 0 or not 0.0 < self.material <= 1.0:
            raise ValueError("credit, guard, room and depth must not be negative, material must lie in (0, 1]")

    @property
    def target(self) -> float:
        """The error that rungs are tested against: the budget less the luck of `horizon` draws, at least half of it."""
        return max(0.5 * self.budget, self.budget - _LUCK * math.sqrt(self.budget / self.horizon))


class Standing(StrEnum):
    """What a category does with its budget; a metric label."""

    LEARNING = "learning"
    """Nothing is served yet; everything is checked."""
    BELIEVED = "believed"
    """Served on the judge's own word: there are not yet labels enough to prove it."""
    TIGHTENED = "tightened"
    """Wrong answers have closed the point where the judge was believed; a stricter one is served."""
    OPEN = "open"
    EXHAUSTED = "exhausted"
    """Served, and no longer: it answers exact repeats only, until it has learnt enough again."""


_UNPROVEN = (Standing.BELIEVED, Standing.TIGHTENED)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a candidate."""

    p: float
    serve: bool
    check: bool
    """Whether to compare the stored answer with the backend's, and to `learn` what came of it."""
    share: float
    """The probability with which such a candidate is checked."""


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """A category's budget for `cache stats` and the metrics."""

    standing: Standing
    point: float | None
    """None while nothing is served."""
    share: float
    savings: float
    """Wrong hits that the budget still allows; negative: right hits are owed."""
    candidates: int
    hits: int
    checked: int
    """Hits with a label."""
    wrong: float
    """Sum of these labels."""
    exhaustions: int


class CategoryBudget:
    """One category's budget; five numbers a rung."""

    def __init__(self, rules: BudgetRules, start: float = NEVER) -> None:
        """`start`: the point from which the judge is believed until labels speak; NEVER believes nothing."""
        self._rules = rules
        self._target = rules.target
        self._enter = math.log(2.0 / rules.risk)
        self._allowed = NEVER
        """The laxest rung that is open, without the guard."""
        self._standing = Standing.LEARNING
        self._savings = 0.0
        self._clean = 0
        """Labels in a row that were right, of candidates from the allowed rung on."""
        self._candidates = self._hits = self._checked = self._exhaustions = 0
        self._wrong_seen = 0.0
        self._starts: tuple[int, ...] = ()
        self._reached = [0] * len(RUNGS)
        """Candidates whose strictest rung it is, and the error that the judge claims for them: until warm."""
        self._claimed = [0.0] * len(RUNGS)
        self._capital = [0.0] * len(RUNGS)
        """Logarithms."""
        self._labels = [0.0] * len(RUNGS)
        self._wrong = [0.0] * len(RUNGS)
        self._open = [False] * len(RUNGS)
        self._believed = start < NEVER and rules.budget > 0
        if self._believed:
            self._believe(start)

    @property
    def limit(self) -> float:
        """The laxest point that the budget allows, with its guard; NEVER while it allows none."""
        if self._allowed == NEVER or not self._guarded():
            return self._allowed
        return RUNGS[min(len(RUNGS) - 1, bisect_left(RUNGS, self._allowed) + self._rules.guard)]

    @property
    def share(self) -> float:
        """The share of hits that is checked now."""
        rules = self._rules
        return max(rules.shadow_min, min(rules.shadow_max, rules.watch / max(self._savings, 1e-9)))

    def point(self, wanted: float = 0.0) -> float:
        """The acceptance point: `wanted`, or the laxest rung that the budget allows if that is stricter.

        Between two rungs `wanted` counts as it is: that those of the candidates above a rung that score better are not
        worse than all of them is the one thing that the judge is believed.
        """
        return max(wanted, self.limit)

    def decide(self, p: float, draw: float, wanted: float = 0.0, *, checks: bool = True) -> Decision:
        """Decide about the best candidate of a look-up, and count it.

        `p`: the judge's probability that it serves; `draw`: uniform in [0, 1); `wanted`: the point that the category's
        rules, the request and the load ask for; `checks`: whether hits can be checked now: what cannot be seen to be
        wrong saves nothing up. Raises ValueError if `p` is no probability.
        """
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{p!r} is not a probability")
        top = bisect_right(RUNGS, p) - 1
        if top < 0:
            return Decision(p, False, False, 0.0)
        self._meet(top, p)
        if p < self.point(wanted):
            return Decision(p, False, True, 1.0)
        share = self.share
        self._hits += 1
        if not checks:
            return Decision(p, True, False, 0.0)
        self._savings = min(self._rules.savings_max, self._savings + self._rules.budget)
        return Decision(p, True, draw < share, share)

    def learn(self, decision: Decision, wrong: float) -> None:
        """Take a label of a decision that asked for a check: 0 right, 1 wrong, or the probability of wrong.

        A comparison that failed is no label: leave it out, as long as failing does not depend on the answers.
        """
        if not 0.0 <= wrong <= 1.0:
            raise ValueError(f"{wrong!r} is not between 0 and 1")
        self._row(decision.p, wrong)
        self._bet(decision.p, wrong, 1.0)
        if decision.serve:
            self._checked += 1
            self._wrong_seen += wrong
            self._spend(decision.p, wrong / decision.share)
        self._settle()

    def complain(self, p: float, weight: float = 1.0) -> None:
        """A hit at `p` was said to be wrong: a user's correction, or, with less weight, a refresh within seconds.

        Counts only against: who complains chooses himself, so silence and praise prove nothing, and a complaint can
        only close rungs earlier than the labels would.
        """
        if not 0.0 < weight <= 1.0:
            raise ValueError(f"a weight lies in (0, 1], not {weight!r}")
        self._row(p, weight)
        self._bet(p, 1.0, weight)
        self._spend(p, weight)
        self._settle()

    def figures(self) -> BudgetFigures:
        """What there is to see."""
        limit = self.limit
        return BudgetFigures(
            standing=self._standing,
            point=None if limit == NEVER else limit,
            share=self.share,
            savings=self._savings,
            candidates=self._candidates,
            hits=self._hits,
            checked=self._checked,
            wrong=self._wrong_seen,
            exhaustions=self._exhaustions,
        )

    def plain(self) -> dict[str, Any]:
        """The state in JSON's own types."""
        return {
            "rungs": len(RUNGS),
            "believed": self._believed,
            "standing": str(self._standing),
            "savings": self._savings,
            "clean": self._clean,
            "counts": [self._candidates, self._hits, self._checked, self._exhaustions],
            "wrong_seen": self._wrong_seen,
            "starts": list(self._starts),
            "reached": list(self._reached),
            "claimed": list(self._claimed),
            "capital": list(self._capital),
            "labels": list(self._labels),
            "wrong": list(self._wrong),
            "open": list(self._open),
        }

    @classmethod
    def restored(cls, rules: BudgetRules, plain: Mapping[str, Any]) -> CategoryBudget:
        """Take a state up again, under the same budget and risk. Raises ValueError when it is not one."""
        found = cls(rules)
        try:
            if plain["rungs"] != len(RUNGS):
                raise ValueError("the state was kept with other rungs")
            found._believed = bool(plain["believed"])
            found._standing = Standing(plain["standing"])
            found._savings = float(plain["savings"])
            found._clean = int(plain["clean"])
            found._candidates, found._hits, found._checked, found._exhaustions = map(int, plain["counts"])
            found._wrong_seen = float(plain["wrong_seen"])
            found._starts = tuple(map(int, plain["starts"]))
            found._reached = _column(plain["reached"], int)
            found._claimed = _column(plain["claimed"], float)
            found._capital = _column(plain["capital"], float)
            found._labels = _column(plain["labels"], float)
            found._wrong = _column(plain["wrong"], float)
            found._open = _column(plain["open"], bool)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of an error budget: {error}") from error
        if not all(0 <= start < len(RUNGS) for start in found._starts):
            raise ValueError("a chain begins at no rung")
        found._allowed = found._laxest()
        return found

    def _meet(self, top: int, p: float) -> None:
        self._candidates += 1
        if self._starts:
            return
        self._reached[top] += 1
        self._claimed[top] += 1.0 - p
        if self._candidates >= self._rules.warmup:
            self._lay()

    def _believe(self, start: float) -> None:
        """Take the rungs from `start` on for earned: the first wrong labels about them count all the same."""
        for rung in range(max(0, bisect_right(RUNGS, start) - 1), len(RUNGS)):
            self._capital[rung] = self._enter + self._rules.room
            self._open[rung] = True
        self._allowed = self._laxest()
        self._standing = Standing.BELIEVED

    def _lay(self) -> None:
        """Choose where the chains begin, from what the judge claims."""
        rules = self._rules
        enough = rules.material * self._candidates
        reached, claimed = 0, 0.0
        material: list[tuple[int, float]] = []
        for rung in reversed(range(len(RUNGS))):
            reached += self._reached[rung]
            claimed += self._claimed[rung]
            if reached >= enough:
                material.append((rung, claimed / reached))
        strictest = material[0][0]
        credible = [rung for rung, error in material if error <= rules.trust * self._target]
        self._starts = (strictest, min(credible, default=strictest))

    def _guarded(self) -> bool:
        rules = self._rules
        return 0.0 <= self._savings < 1.0 and self._clean * rules.budget < _CLEAN

    def _row(self, p: float, wrong: float) -> None:
        """Count right labels in a row."""
        if p >= self._allowed:
            self._clean = self._clean + 1 if wrong < _WRONG else 0

    def _bet(self, p: float, wrong: float, weight: float) -> None:
        rules, target = self._rules, self._target
        keep = 1.0 - _FORGET * target * weight
        for rung in range(bisect_right(RUNGS, p)):
            # What the labels so far suggest sets the size of the bet; any size is fair, only the speed depends on it.
            rate = (self._wrong[rung] + _BELIEF) / (self._labels[rung] * target + 1.0)
            bet = max(_LEAST_BET, min(_LARGEST_BET, 1.0 - rate))
            capital = self._capital[rung] + weight * math.log1p(bet * (target - wrong))
            self._capital[rung] = capital = max(-rules.depth, min(self._enter + rules.room, capital))
            self._labels[rung] = self._labels[rung] * keep + weight
            self._wrong[rung] = self._wrong[rung] * keep + weight * wrong
            if capital >= self._enter:
                self._open[rung] = True
            elif capital < self._enter - rules.drop:
                self._open[rung] = False

    def _spend(self, p: float, wrong: float) -> None:
        """Charge wrong hits to the account; beyond its credit, the rungs that let them through must be earned again."""
        if wrong <= 0.0:
            return
        self._savings -= wrong
        if self._savings >= -self._rules.credit:
            return
        self._savings = -self._rules.credit
        for rung in range(bisect_right(RUNGS, p)):
            if self._open[rung]:
                self._open[rung] = False
                self._capital[rung] = min(self._capital[rung], self._enter - self._rules.drop)

    def _settle(self) -> None:
        allowed = self._laxest()
        if allowed != NEVER:
            if self._standing not in _UNPROVEN or self._proven(allowed):
                self._standing = Standing.OPEN
            elif allowed > self._allowed:
                self._standing = Standing.TIGHTENED
        elif self._allowed != NEVER:
            self._standing = Standing.EXHAUSTED
            self._exhaustions += 1
        self._allowed = allowed

    def _proven(self, allowed: float) -> bool:
        """Whether the labels above a believed point are as many as would have earned it."""
        return self._labels[bisect_left(RUNGS, allowed)] * self._target >= self._enter

    def _laxest(self) -> float:
        """The laxest rung that a chain of open rungs leads to."""
        laxest = len(RUNGS)
        believed = (len(RUNGS) - 1,) if self._believed else ()
        for rung in (*self._starts, *believed):
            while rung >= 0 and self._open[rung]:
                laxest = min(laxest, rung)
                rung -= 1
        return RUNGS[laxest] if laxest < len(RUNGS) else NEVER


def _column(values: Any, kind: type[Any]) -> list[Any]:
    column = [kind(value) for value in values]
    if len(column) != len(RUNGS) or not all(math.isfinite(value) for value in column):
        raise ValueError("a column does not fit the rungs")
    return column
