"""What has been learnt of the judge: error budgets, evidence of entries, refuted pairs, the worth of comparing.

Decides and remembers, and does nothing else: asking the backend and comparing is in `gateway/checks.py`, keeping the
state on disk in `gateway/truststate.py`. Every method belongs to the event loop's thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import random
from typing import Any, Literal

from policies.budget import NEVER, RUNGS, BudgetRules, CategoryBudget, Decision, Standing
from policies.category import CategoryPolicy
from policies.economics import CategoryEconomics, EconomicsRules, Stage
from policies.entries import EntryEvidence, EntryRules
from policies.judge import Accepted, Candidate, Judgement, Verdict
from policies.judge import Stage as JudgeStage
from policies.reasons import Complaint, Miss
from policies.refuted import Refuted, pair

log = logging.getLogger(__name__)

_VERSION = 1
_SERVED = 4096
"""Hits that can still be complained about."""
_REFRESH_WEIGHT = 0.25
"""What a refresh counts as evidence: some refresh because they want news, not because the answer was wrong."""
_GUARD: Mapping[str, int] = {"judge": 0, "earned": 2}
"""Rungs of the guard. A believed judge would be within its budget a little more often with it too, but the pair model
hardly says more than .97: a rung above its point, a third to a half of the paraphrases are not served at first.
"""
_WRONG = 0.5
"""From this label on a pair is taken for refuted."""


@dataclass(frozen=True, slots=True)
class TrustRules:
    """How much is believed, and what is learnt."""

    keep: bool = True
    """Whether error budgets are kept; if not, the judge's word is taken."""
    start: Literal["judge", "earned"] = "judge"
    risk: float = 0.05
    horizon: int = 5000
    shadow_min: float = 0.05
    shadow_max: float = 0.1
    guard: bool = True
    """Whether the first hits are asked for more than is allowed; means something of probabilities alone."""
    refresh_within: float = 10.0
    """Seconds after a hit in which a refresh of the same call is a complaint."""
    skip: bool = True
    """Whether a category whose comparing does not pay skips it."""
    entries: EntryRules = field(default_factory=EntryRules)
    economics: EconomicsRules = field(default_factory=EconomicsRules)

    def budget(self, error_budget: float) -> BudgetRules:
        """Return the rules of one category's budget."""
        return BudgetRules(
            budget=error_budget,
            risk=self.risk,
            horizon=self.horizon,
            shadow_min=self.shadow_min,
            shadow_max=self.shadow_max,
            guard=_GUARD[self.start] if self.guard else 0,
        )


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is thought of the best candidate of a look-up."""

    category: str
    entry: int
    pair: bytes
    claimed: float
    """The judge's probability,"""
    p: float
    """and that probability moved by what the entry has shown."""
    wanted: float
    """The point that the rules and the load ask for,"""
    point: float
    """and the one in force: the budget may be stricter, or infinite."""
    serve: bool


@dataclass(frozen=True, slots=True)
class _Served:
    """A hit by meaning that somebody got."""

    namespace: str
    ruling: Ruling
    at: float


class Trust:
    """See the module's docstring."""

    def __init__(
        self,
        rules: TrustRules,
        policies: Mapping[str, CategoryPolicy],
        point: Callable[[CategoryPolicy], float],
        *,
        judge: str = "",
        draw: Callable[[], float] = random,
    ) -> None:
        """`point` is the judge's own acceptance point, `judge` its identity: labels of another one mean nothing."""
        self.rules = rules
        self.changed = 0
        """Grows with everything that is worth keeping."""
        self._policies = policies
        self._judge = judge
        self._draw = draw
        self._point = point
        self._budgets = {name: self._fresh_budget(policy) for name, policy in policies.items()} if rules.keep else {}
        self._economics = {name: CategoryEconomics(rules.economics) for name in policies}
        self._entries = EntryEvidence(rules.entries)
        self._refuted = Refuted()
        self._served: OrderedDict[bytes, _Served] = OrderedDict()
        self.complaints: dict[Complaint, int] = defaultdict(int)

    def _fresh_budget(self, policy: CategoryPolicy) -> CategoryBudget:
        start = self._point(policy) if self.rules.start == "judge" else NEVER
        return CategoryBudget(self.rules.budget(policy.error_budget), start)

    # Deciding

    def unrefuted(self, scope: bytes, text: str, candidates: Sequence[Candidate]) -> dict[int, bytes]:
        """Return the candidates that may be judged, by id with the name of their pair."""
        named = {candidate.id: pair(scope, text, candidate.text) for candidate in candidates}
        return {id: name for id, name in named.items() if name not in self._refuted}

    def rule(
        self, policy: CategoryPolicy, judgement: Judgement, pairs: Mapping[int, bytes], wanted: float
    ) -> Ruling | None:
        """Say what becomes of the best candidate; counts nothing. None: the judge has scored none."""
        scored = [(self._entries.adjusted(verdict.candidate.id, p), p, verdict) for verdict, p in _scored(judgement)]
        if not scored:
            return None
        p, claimed, verdict = max(scored, key=lambda item: (item[0], item[2].candidate.similarity))
        budget = self._budgets.get(policy.name)
        point = wanted if budget is None else budget.point(wanted)
        id = verdict.candidate.id
        return Ruling(policy.name, id, pairs[id], claimed, p, wanted, point, p >= point)

    def reason(self, ruling: Ruling, judgement: Judgement) -> Miss:
        """Say why a candidate is not served."""
        if not isinstance(judgement, Accepted) and ruling.p < ruling.wanted:
            return judgement.reason
        if ruling.point < NEVER:
            return Miss.BELOW_POINT
        standing = self._budgets[ruling.category].figures().standing
        return Miss.BUDGET_EXHAUSTED if standing is Standing.EXHAUSTED else Miss.BUDGET_LEARNING

    def settle(self, ruling: Ruling, *, checks: bool) -> Decision | None:
        """Count a candidate that was served or refused as ruled, and say whether to check it; None: nothing to check.

        `checks`: whether hits can be checked now.
        """
        budget = self._budgets.get(ruling.category)
        if budget is None:
            return None
        self.changed += 1
        decision = budget.decide(ruling.p, self._draw(), ruling.wanted, checks=checks)
        if not decision.serve and not decision.check and ruling.claimed >= RUNGS[0]:
            # What counts against the entry alone: it can redeem itself only if it is looked at.
            return replace(decision, check=True, share=1.0)
        return decision

    def learn(self, ruling: Ruling, decision: Decision, wrong: float) -> None:
        """Take what a check found: 0 right, 1 wrong, or between."""
        self.changed += 1
        self._budgets[ruling.category].learn(decision, wrong)
        self._entries.learn(ruling.entry, ruling.claimed, wrong)
        if wrong >= _WRONG:
            self._refuted.add(ruling.pair)

    # Complaints

    def served(self, key: bytes, namespace: str, ruling: Ruling, now: float) -> None:
        """Remember a hit for as long as it may be complained about; `key` is that of the call."""
        self._served.pop(key, None)
        self._served[key] = _Served(namespace, ruling, now)
        if len(self._served) > _SERVED:
            self._served.popitem(last=False)

    def refreshed(self, key: bytes, now: float) -> int | None:
        """A call was asked anew; return the entry to remove if it got a hit by meaning just before."""
        served = self._served.get(key)
        if served is None or not 0 <= now - served.at <= self.rules.refresh_within:
            return None
        self._complain([key], Complaint.REFRESH, _REFRESH_WEIGHT)
        return served.ruling.entry

    def corrected(self, entry: int, namespace: str) -> int:
        """A client said that an entry's answer was wrong; return how many hits of that namespace are meant."""
        keys = [
            key
            for key, served in self._served.items()
            if served.ruling.entry == entry and _inside(served.namespace, namespace)
        ]
        self._complain(keys, Complaint.FEEDBACK, 1.0)
        return len(keys)

    def _complain(self, keys: Sequence[bytes], kind: Complaint, weight: float) -> None:
        """Count one complaint, about the latest of these hits; none of their pairs comes back."""
        self.changed += 1
        self.complaints[kind] += 1
        for place, key in enumerate(reversed(keys)):
            ruling = self._served.pop(key).ruling
            self._refuted.add(ruling.pair)
            self._entries.forget(ruling.entry)
            budget = self._budgets.get(ruling.category)
            if place == 0 and budget is not None:
                budget.complain(ruling.p, weight)

    # Economics

    def worth(self, category: str) -> bool:
        """Whether the next call of a category is to be compared by meaning; counts it as skipped if not."""
        return not self.rules.skip or self._economics[category].allows()

    def skipping(self, category: str) -> bool:
        """The same, counting nothing."""
        return self.rules.skip and self._economics[category].balance().stage is Stage.SKIPPED

    def looked(self, category: str, seconds: float, *, hit: bool) -> None:
        """A call was compared by meaning in so many seconds."""
        self._economics[category].looked(seconds, hit=hit)

    def generated(self, category: str, seconds: float) -> None:
        """A backend's answer to a call of a category took so many seconds."""
        self._economics[category].generated(seconds)

    def fetched(self, category: str, seconds: float, cost: float, price: float) -> None:
        """A hit by meaning took `seconds` to fetch and saved `cost` seconds and `price` of money."""
        self._economics[category].fetched(seconds, cost=cost, price=price)

    # Figures and state

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return what there is to see, by category, in JSON's own types; only of categories that have seen anything."""
        found: dict[str, dict[str, Any]] = {}
        for name, economics in self._economics.items():
            balance, budget = economics.balance(), self._budgets.get(name)
            figures = None if budget is None else budget.figures()
            if balance.lookups or balance.generate is not None or (figures is not None and figures.candidates):
                found[name] = {"error_budget": self._policies[name].error_budget}
                found[name] |= {"budget": None if figures is None else asdict(figures), "economics": asdict(balance)}
        return found

    def figures(self, category: str) -> dict[str, Any] | None:
        """Return one category's budget for people who ask why; None where none is kept."""
        budget = self._budgets.get(category)
        return None if budget is None else asdict(budget.figures())

    @property
    def refuted(self) -> int:
        """Pairs that never come together again."""
        return len(self._refuted)

    def plain(self) -> dict[str, Any]:
        """The state in JSON's own types."""
        return {
            "version": _VERSION,
            "judge": self._judge,
            "budgets": {
                name: {"rules": self._terms(name), "state": budget.plain()} for name, budget in self._budgets.items()
            },
            "entries": self._entries.plain(),
            "refuted": self._refuted.plain(),
            "economics": {name: economics.plain() for name, economics in self._economics.items()},
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take a state up again; budgets of another judge or other rules begin anew. Raises ValueError, TypeError,
        KeyError or AttributeError when it is not one, and changes nothing then.
        """
        if plain["version"] != _VERSION:
            raise ValueError(f"it is of version {plain['version']}, not {_VERSION}")
        rules, refuted = self.rules, Refuted.restored(plain["refuted"])
        economics = {
            name: CategoryEconomics.restored(rules.economics, state)
            for name, state in plain["economics"].items()
            if name in self._economics
        }
        budgets: dict[str, CategoryBudget] = {}
        entries = self._entries
        if plain["judge"] == self._judge:
            entries = EntryEvidence.restored(rules.entries, plain["entries"])
            for name, kept in plain["budgets"].items():
                if name in self._budgets and kept["rules"] == self._terms(name):
                    budget_rules = rules.budget(self._policies[name].error_budget)
                    budgets[name] = CategoryBudget.restored(budget_rules, kept["state"])
        else:
            log.warning("the judge is another one than before: error budgets and what entries showed begin anew")
        self._entries, self._refuted = entries, refuted
        self._economics |= economics
        self._budgets |= budgets

    def _terms(self, category: str) -> list[Any]:
        """What must be the same for a budget's state to mean anything."""
        rules = self.rules
        return [self._policies[category].error_budget, rules.risk, rules.horizon, rules.start, rules.guard]


def stats_of(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what `Trust.stats` of a state's owner would say. Raises what `Trust.restore` raises."""
    terms = {name: kept["rules"] for name, kept in plain["budgets"].items()}
    policies = {name: CategoryPolicy(name, error_budget=terms.get(name, [0.0])[0]) for name in plain["economics"]}
    some: list[Any] = next(iter(terms.values()), [0.0, 0.5, 1, "judge", False])
    _, risk, horizon, start, guard = some
    rules = TrustRules(keep=bool(terms), risk=risk, horizon=horizon, start=start, guard=guard)
    known = Trust(rules, policies, lambda policy: NEVER, judge=plain["judge"])
    known.restore(plain)
    return known.stats()


def _scored(judgement: Judgement) -> Iterable[tuple[Verdict, float]]:
    """The verdicts with a number; where similarity alone decides, it is the number."""
    for verdict in judgement.verdicts:
        if verdict.probability is not None:
            yield verdict, verdict.probability
        elif verdict.stage is JudgeStage.SIMILARITY:
            yield verdict, min(1.0, max(0.0, verdict.candidate.similarity))


def _inside(namespace: str, outer: str) -> bool:
    return namespace == outer or namespace.startswith(f"{outer}/")
