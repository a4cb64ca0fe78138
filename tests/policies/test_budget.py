"""The error budget: what may be served, what closes it, how it finds back, what survives a restart."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.budget import NEVER, RUNGS, BudgetRules, CategoryBudget, Standing

RULES = BudgetRules(budget=0.05)


def drive(
    budget: CategoryBudget, error: float, lookups: int, seed: int = 0, p: float = 0.99, wanted: float = 0.0
) -> tuple[int, int]:
    """Ask for candidates at `p` that are wrong with probability `error`; return hits and wrong hits."""
    draw = random.Random(seed)
    hits = wrongs = 0
    for _ in range(lookups):
        decision = budget.decide(p, draw.random(), wanted)
        wrong = draw.random() < error
        hits += decision.serve
        wrongs += decision.serve and wrong
        if decision.check:
            budget.learn(decision, float(wrong))
    return hits, wrongs


def opened(rules: BudgetRules = RULES) -> CategoryBudget:
    budget = CategoryBudget(rules)
    while budget.limit == NEVER:
        drive(budget, 0.0, 1)
    return budget


def test_nothing_is_served_before_it_is_earned() -> None:
    budget = CategoryBudget(RULES)
    decision = budget.decide(0.999999, 0.0)
    assert (decision.serve, decision.check, decision.share) == (False, True, 1.0)
    assert budget.figures().standing is Standing.LEARNING
    assert budget.point() == NEVER


def test_what_is_always_right_opens_after_about_three_over_the_target() -> None:
    figures = opened().figures()
    assert figures.standing is Standing.OPEN
    assert figures.hits == 0
    assert figures.candidates == pytest.approx(3.0 / RULES.target, rel=0.5)


@pytest.mark.parametrize("error", [0.06, 0.1, 0.5])
def test_what_is_wrong_too_often_is_hardly_ever_served(error: float) -> None:
    runs = [CategoryBudget(RULES) for _ in range(20)]
    served = [drive(budget, error, 3000, seed)[0] > 0 for seed, budget in enumerate(runs)]
    assert sum(served) <= 2


def test_a_judge_that_is_sure_of_itself_gains_nothing_by_it() -> None:
    budget = CategoryBudget(RULES)
    assert drive(budget, 0.2, 5000, p=1.0) == (0, 0)


def test_a_timid_judge_is_served_all_the_same() -> None:
    budget = CategoryBudget(RULES)
    hits, wrong = drive(budget, 0.002, 3000, p=0.6)
    assert hits > 2000
    assert wrong <= RULES.budget * hits


def test_below_the_laxest_rung_nothing_is_compared() -> None:
    budget = CategoryBudget(RULES)
    decision = budget.decide(0.49, 0.0)
    assert not decision.serve
    assert not decision.check
    assert budget.figures().candidates == 0


def test_two_kinds_of_candidates_are_told_apart_by_their_rung() -> None:
    budget = CategoryBudget(RULES)
    for seed in range(3000):
        drive(budget, 0.0, 1, seed, p=0.995)
        drive(budget, 0.4, 1, seed, p=0.7)
    assert 0.7 < budget.limit <= 0.995
    assert not budget.decide(0.7, 0.5).serve
    assert budget.decide(0.995, 0.5).serve


def test_wrong_answers_close_a_category_and_right_ones_open_it_again() -> None:
    budget = opened()
    drive(budget, 0.0, 500, seed=1)
    hits, _ = drive(budget, 1.0, 200, seed=2)
    assert hits < 60
    figures = budget.figures()
    assert figures.standing is Standing.EXHAUSTED
    assert figures.point is None
    assert figures.exhaustions == 1
    assert not budget.decide(0.99, 0.0).serve
    drive(budget, 0.0, 500, seed=3)
    assert budget.figures().standing is Standing.OPEN


def test_checks_are_many_at_first_and_few_when_much_is_saved_up() -> None:
    budget = opened()
    assert budget.share == RULES.shadow_max
    drive(budget, 0.0, 20_000)
    assert budget.share == pytest.approx(RULES.watch / RULES.savings_max)


def test_complaints_close_a_category_praise_does_not_exist() -> None:
    budget = opened()
    for _ in range(40):
        budget.complain(0.99)
    assert budget.figures().standing is Standing.EXHAUSTED


def test_a_refresh_weighs_less_than_a_correction() -> None:
    def complaints(weight: float) -> int:
        budget = opened()
        drive(budget, 0.0, 200)
        count = 0
        while budget.limit != NEVER:
            budget.complain(0.99, weight)
            count += 1
        return count

    assert complaints(0.25) > complaints(1.0)


def test_the_wanted_point_is_kept_where_it_is_stricter() -> None:
    budget = opened()
    assert budget.point(0.0) == budget.limit
    assert budget.point(0.9999) >= 0.9999
    assert not budget.decide(0.99, 0.0, wanted=0.999).serve
    assert budget.point(0.9999999) == 0.9999999
    assert CategoryBudget(RULES).point(0.9) == NEVER


def test_a_believed_judge_is_served_at_once_and_closed_by_the_first_wrong_answers() -> None:
    budget = CategoryBudget(RULES, start=0.9)
    assert budget.figures().standing is Standing.BELIEVED
    assert budget.decide(0.96, 0.5, wanted=0.9).serve
    assert not budget.decide(0.89, 0.5, wanted=0.9).serve
    for _ in range(3):
        budget.learn(budget.decide(0.96, 0.0, wanted=0.9), 1.0)
    assert not budget.decide(0.96, 0.5, wanted=0.9).serve
    # What is stricter than all that was wrong stays open.
    assert budget.decide(0.99, 0.5, wanted=0.9).serve


def test_a_believed_judge_is_proven_by_as_many_labels_as_would_have_earned_it() -> None:
    budget = CategoryBudget(RULES, start=0.9)
    drive(budget, 0.0, 2000, wanted=0.9)
    assert budget.figures().standing is Standing.OPEN
    assert CategoryBudget(BudgetRules(budget=0.0), start=0.9).limit == NEVER


def test_a_believed_judge_that_is_wrong_keeps_its_budget_in_the_end() -> None:
    hits, wrong = drive(CategoryBudget(RULES, start=0.9), 0.3, 5000, wanted=0.9)
    assert wrong <= 10
    assert hits < 60


def believed(guard: int = RULES.guard) -> CategoryBudget:
    return CategoryBudget(replace(RULES, guard=guard), start=0.9)


def test_the_first_hits_are_asked_for_more() -> None:
    allowed = believed(guard=0).limit
    assert believed().limit == RUNGS[RUNGS.index(allowed) + RULES.guard]
    between = believed().decide(0.92, 0.5, wanted=0.9)
    assert (between.serve, between.check, between.share) == (False, True, 1.0)
    assert believed(guard=0).decide(0.92, 0.5, wanted=0.9).serve
    assert CategoryBudget(RULES, start=RUNGS[-1]).limit == RUNGS[-1]


def test_the_guard_is_lifted_when_one_wrong_hit_no_longer_breaks_the_budget() -> None:
    budget = believed()
    for _ in range(round(1.0 / RULES.budget)):
        assert budget.limit > believed(guard=0).limit
        assert budget.decide(0.99, 1.0).serve
    assert budget.figures().savings == pytest.approx(1.0)
    assert budget.limit == believed(guard=0).limit


def test_a_broken_budget_needs_right_hits_and_is_not_guarded() -> None:
    budget = believed()
    budget.complain(0.9)
    assert budget.figures().savings < 0.0
    allowed = budget.plain()["open"].index(True)
    assert budget.limit == RUNGS[allowed]


def test_a_row_of_right_labels_lifts_the_guard_and_a_wrong_one_begins_it_anew() -> None:
    budget = believed()
    row = round(3.0 / RULES.budget)
    for place in range(row + row // 2):
        decision = budget.decide(0.92, 0.0, wanted=0.9)
        assert not decision.serve
        budget.learn(decision, float(place == row // 2 - 1))
    assert budget.limit == believed(guard=0).limit
    assert budget.decide(0.92, 0.0, wanted=0.9).serve


def test_candidates_that_all_score_alike_are_not_guarded_for_ever() -> None:
    for p in (0.6, 0.9, 0.99999):
        assert drive(CategoryBudget(RULES), 0.0, 400, p=p)[0] > 200


def test_the_account_begins_with_nothing_and_closes_beyond_its_credit() -> None:
    rules = replace(RULES, credit=1.5, drop=50.0)
    budget = CategoryBudget(rules, start=0.9)
    assert budget.figures().savings == 0.0
    assert budget.share == rules.shadow_max
    budget.complain(0.99999999)
    assert budget.figures().savings == -1.0
    assert budget.limit < NEVER
    budget.complain(0.99999999)
    assert budget.figures().savings == -1.5
    assert budget.figures().standing is Standing.EXHAUSTED


def test_hits_that_cannot_be_checked_save_nothing_up() -> None:
    budget = CategoryBudget(RULES, start=0.9)
    before = budget.figures().savings
    decision = budget.decide(0.99, 0.0, checks=False)
    assert (decision.serve, decision.check) == (True, False)
    assert budget.figures().savings == before


def test_a_budget_of_nothing_serves_nothing() -> None:
    assert drive(CategoryBudget(BudgetRules(budget=0.0)), 0.0, 3000) == (0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 1.0},
        {"budget": -0.1},
        {"risk": 0.0},
        {"shadow_min": 0.0},
        {"shadow_min": 0.5, "shadow_max": 0.4},
        {"shadow_max": 1.1},
        {"horizon": 0},
        {"material": 0.0},
        {"depth": -1.0},
        {"guard": -1},
    ],
)
def test_impossible_rules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        BudgetRules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(p: float) -> None:
    budget = opened()
    with pytest.raises(ValueError, match="probability"):
        budget.decide(p, 0.0)
    with pytest.raises(ValueError, match="between"):
        budget.learn(budget.decide(0.99, 0.0), p)


_STEPS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=120)


@given(_STEPS, st.sampled_from([0.005, 0.05, 0.3]))
@settings(max_examples=40)
def test_the_state_survives_a_restart(steps: list[tuple[float, float, float]], budget: float) -> None:
    rules = BudgetRules(budget=budget, warmup=8)
    one = CategoryBudget(rules)
    for place, (p, draw, wrong) in enumerate(steps):
        decision = one.decide(p, draw)
        if decision.check:
            one.learn(decision, wrong)
        if place == len(steps) // 2:
            two = CategoryBudget.restored(rules, json.loads(json.dumps(one.plain())))
            assert two.plain() == one.plain()
            assert two.figures() == one.figures()
            one = two


@given(_STEPS)
@settings(max_examples=40)
def test_capital_stays_bounded_and_what_is_served_is_open(steps: list[tuple[float, float, float]]) -> None:
    rules = BudgetRules(budget=0.3, warmup=4, risk=0.5)
    budget = CategoryBudget(rules)
    for p, draw, wrong in steps:
        decision = budget.decide(p, draw)
        assert not decision.serve or p >= budget.limit
        if decision.check:
            budget.learn(decision, wrong)
        state = budget.plain()
        assert all(-rules.depth <= capital <= 3 + rules.room for capital in state["capital"])
        assert -rules.credit <= state["savings"] <= rules.savings_max
        if budget.limit != NEVER:
            assert any(state["open"][: RUNGS.index(budget.limit) + 1])


@given(st.floats(0, 0.99), st.integers(1, 10**6))
def test_the_target_lies_within_the_budget(budget: float, horizon: int) -> None:
    assert budget / 2 <= BudgetRules(budget=budget, horizon=horizon).target <= budget


@pytest.mark.parametrize(
    "change",
    [
        {"rungs": 3},
        {"capital": [0.0]},
        {"standing": "asleep"},
        {"savings": None},
        {"clean": "many"},
        {"starts": [99]},
        {"wrong": [float("nan")] * len(RUNGS)},
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        CategoryBudget.restored(RULES, CategoryBudget(RULES).plain() | change)
    with pytest.raises(ValueError, match="not the state"):
        CategoryBudget.restored(RULES, {})
