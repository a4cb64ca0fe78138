"""Whether comparing by meaning pays."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.economics import CategoryEconomics, EconomicsRules, Stage, break_even

RULES = EconomicsRules(memory=400, evidence=100, pause=200, longest_pause=800)


def drive(economics: CategoryEconomics, calls: int, every: int, lookup: float = 0.03, generate: float = 0.2) -> int:
    """Make calls of which every `every`-th would hit (0: none); return how many were compared."""
    compared = 0
    for call in range(calls):
        if not economics.allows():
            economics.generated(generate)
            continue
        compared += 1
        hit = every > 0 and call % every == 0
        economics.looked(lookup, hit=hit)
        if hit:
            economics.fetched(0.001, cost=generate, price=0.5)
        else:
            economics.generated(generate)
    return compared


def test_break_even_is_the_cost_of_looking_over_what_a_hit_saves() -> None:
    assert break_even(0.03, 0.21, 0.01) == pytest.approx(0.15)
    assert break_even(None, 1.0) is None
    assert break_even(0.1, None) is None
    assert break_even(0.1, 0.01, 0.02) == math.inf


def test_what_pays_is_never_skipped() -> None:
    economics = CategoryEconomics(RULES)
    assert drive(economics, 3000, every=3) == 3000
    balance = economics.balance()
    assert balance.stage is Stage.ON
    assert balance.hit_rate == pytest.approx(1 / 3, abs=0.01)
    assert balance.saved_seconds > 0
    assert balance.saved_price == 500


def test_what_does_not_pay_is_skipped_for_longer_and_longer() -> None:
    economics = CategoryEconomics(RULES)
    assert drive(economics, 100, every=0) == 100
    assert economics.balance().stage is Stage.SKIPPED
    assert economics.balance().saved_seconds < 0
    pauses = []
    for _ in range(4):
        before = drive_until(economics, Stage.PROBING)
        pauses.append(before)
        drive(economics, 100, every=0)
    assert pauses == [200, 400, 800, 800]


def drive_until(economics: CategoryEconomics, stage: Stage) -> int:
    calls = 0
    while economics.balance().stage is not stage:
        economics.allows()
        calls += 1
    return calls


def test_a_probe_that_pays_turns_the_stage_on_again() -> None:
    economics = CategoryEconomics(RULES)
    drive(economics, 100, every=0)
    drive_until(economics, Stage.PROBING)
    drive(economics, 100, every=2)
    assert economics.balance().stage is Stage.ON
    assert drive(economics, 1000, every=2) == 1000


def test_a_probe_must_clearly_pay() -> None:
    economics = CategoryEconomics(RULES)
    drive(economics, 100, every=0)
    drive_until(economics, Stage.PROBING)
    # Break-even is .15; 17 hits of 100 lie above it, but within the gap.
    drive(economics, 100, every=6)
    assert economics.balance().stage is Stage.SKIPPED


def test_nothing_is_judged_while_the_backend_is_unknown() -> None:
    economics = CategoryEconomics(RULES)
    for _ in range(1000):
        assert economics.allows()
        economics.looked(9.0, hit=False)
    assert economics.break_even is None


def test_a_lookup_dearer_than_a_generation_never_pays() -> None:
    economics = CategoryEconomics(RULES)
    drive(economics, 200, every=1, lookup=1.0, generate=0.1)
    assert economics.balance().stage is Stage.ON  # Every hit saves the generation, but none is known yet.
    economics.generated(0.1)
    economics.looked(1.0, hit=True)
    assert economics.balance().stage is Stage.SKIPPED


_EVENT = st.tuples(st.sampled_from(["look", "hit", "generate"]), st.floats(0, 100))


@given(st.lists(_EVENT, max_size=80))
def test_the_state_survives_a_restart(events: list[tuple[str, float]]) -> None:
    rules = EconomicsRules(memory=10, evidence=5, pause=3, longest_pause=9)
    economics = CategoryEconomics(rules)
    for kind, seconds in events:
        if kind == "generate":
            economics.generated(seconds)
        elif economics.allows():
            economics.looked(seconds, hit=kind == "hit")
        again = CategoryEconomics.restored(rules, json.loads(json.dumps(economics.plain())))
        assert again.plain() == economics.plain()
        assert again.balance() == economics.balance()


def test_impossible_rules_and_damaged_states_are_refused() -> None:
    with pytest.raises(ValueError, match="economics"):
        EconomicsRules(evidence=10, memory=5)
    for damaged in ({}, {"means": 3}, CategoryEconomics(RULES).plain() | {"stage": "gone"}):
        with pytest.raises(ValueError):
            CategoryEconomics.restored(RULES, damaged)
