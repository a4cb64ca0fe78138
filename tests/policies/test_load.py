"""The load of a pool, and what gives way for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.budget import BudgetRules, CategoryBudget
from policies.category import CategoryPolicy
from policies.load import Load, LoadRules, Recent, Relief, Signals, pressure, relaxed

RULES = LoadRules()
CALM = Signals(in_flight=1, slots=10)
FULL = Signals(in_flight=100, slots=10)


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        (CALM, 0.0),
        (Signals(5, 10), 0.0),
        (Signals(10, 10), 0.5),
        (Signals(15, 10), 1.0),
        (Signals(0, 10, latency=10.0), 0.0),
        (Signals(0, 10, latency=15.0), 0.5),
        (Signals(0, 10, latency=99.0), 1.0),
        (Signals(0, 10, refused=0.05), 0.5),
        (Signals(0, 10, refused=1.0), 1.0),
        (Signals(3, 0), 1.0),
    ],
)
def test_the_worst_signal_counts(signals: Signals, expected: float) -> None:
    assert pressure(signals, RULES) == pytest.approx(expected)


def test_load_rises_quickly_and_falls_slowly() -> None:
    load = Load().after(0.0, CALM, RULES).after(2.0, FULL, RULES)
    assert load.level == pytest.approx(0.632, abs=0.01)
    assert load.engaged
    assert load.after(4.0, CALM, RULES).level > 0.5


def test_relaxing_ends_at_a_lower_load_than_it_begins() -> None:
    load = Load(level=0.4, engaged=False, at=0.0)
    assert load.relief == 0.0
    load = Load(level=0.4, engaged=True, at=0.0)
    assert load.relief == 0.4
    assert load.after(1.0, CALM, RULES).engaged
    assert not load.after(60.0, CALM, RULES).engaged


def test_it_does_not_oscillate_around_one_point() -> None:
    load, changes = Load().after(0.0, CALM, RULES), 0
    for second in range(1, 600):
        # Relief takes the load away, its end brings it back: without hysteresis that flips every second.
        signals = Signals(9 if load.engaged else 12, 10)
        after = load.after(float(second), signals, RULES)
        changes += after.engaged != load.engaged
        load = after
    assert changes <= 600 / 10


def test_a_clock_that_goes_back_stands_still() -> None:
    load = Load().after(10.0, FULL, RULES)
    assert load.after(5.0, CALM, RULES) == load


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_relaxing_is_bounded_by_floor_and_reach(wanted: float, floor: float, relief: float, reach: float) -> None:
    point = relaxed(wanted, floor, relief, reach)
    assert min(floor, wanted) <= point <= wanted
    assert point >= wanted - reach - 1e-12
    assert relaxed(wanted, floor, relief, 0.0) == wanted
    assert relaxed(wanted, floor, 0.0, reach) == wanted


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_error_budget_has_the_last_word(wanted: float, relief: float, reach: float) -> None:
    budget = CategoryBudget(BudgetRules(budget=0.05))
    assert budget.point(relaxed(wanted, 0.0, relief, reach)) >= budget.limit


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50), st.floats(0, 1)), max_size=30))
def test_the_level_stays_a_share(looks: list[tuple[float, int, float]]) -> None:
    load = Load()
    for now, in_flight, refused in looks:
        load = load.after(now, Signals(in_flight, 10, refused=refused), RULES)
        assert 0.0 <= load.relief <= load.level <= 1.0


def test_ttl_stretches_with_relief() -> None:
    relaxing, strict = CategoryPolicy("a", ttl=100.0, max_relax=0.1), CategoryPolicy("b", ttl=100.0)
    assert Relief(0.0, 1.0).stretched(relaxing).ttl == 100.0
    assert Relief(0.5, 1.0).stretched(relaxing).ttl == 150.0
    assert Relief(0.5, 1.0).stretched(strict).ttl == 100.0


def test_what_is_recent_forgets() -> None:
    recent = Recent()
    recent.note(2.0, refused=False, now=1.0)
    assert recent.latency == 2.0
    for _ in range(50):
        recent.note(9.0, refused=True, now=2.0)
    assert recent.refused > 0.9
    assert recent.latency == 2.0
    for _ in range(50):
        recent.note(4.0, refused=False, now=3.0)
    assert recent.refused < 0.1
    assert recent.latency == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize(
    "wrong",
    [{"engage": 0.2}, {"release": 0.6}, {"queue_free": 2.0}, {"late": 1.0}, {"rise": 0.0}],
)
def test_impossible_rules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        LoadRules(**wrong)
