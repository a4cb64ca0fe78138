"""What single entries have shown."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.entries import EntryEvidence, EntryRules


def test_an_unknown_entry_is_left_to_the_judge() -> None:
    assert EntryEvidence(EntryRules()).adjusted(1, 0.7) == 0.7


def test_one_wrong_answer_lowers_and_three_right_ones_raise() -> None:
    evidence = EntryEvidence(EntryRules())
    evidence.learn(1, 0.9, 1.0)
    assert evidence.adjusted(1, 0.9) < 0.85
    for _ in range(2):
        evidence.learn(2, 0.6, 0.0)
    assert evidence.adjusted(2, 0.6) == 0.6
    evidence.learn(2, 0.6, 0.0)
    assert evidence.adjusted(2, 0.6) > 0.7
    assert evidence.adjusted(3, 0.6) == 0.6


def test_it_comes_near_to_what_an_entry_really_is() -> None:
    draw, evidence = random.Random(0), EntryEvidence(EntryRules())
    for _ in range(400):
        evidence.learn(1, 0.9, float(draw.random() < 0.6))
    assert evidence.adjusted(1, 0.9) == pytest.approx(0.4, abs=0.08)


def test_the_oldest_is_forgotten_and_a_removed_one_at_once() -> None:
    evidence = EntryEvidence(EntryRules(entries=2))
    for entry in (1, 2, 3):
        evidence.learn(entry, 0.9, 1.0)
    assert len(evidence) == 2
    assert evidence.adjusted(1, 0.9) == 0.9
    evidence.forget(3)
    evidence.forget(99)
    assert evidence.adjusted(3, 0.9) == 0.9


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1), st.floats(0, 1)), max_size=60))
def test_any_labels_give_probabilities_and_survive_a_restart(labels: list[tuple[int, float, float]]) -> None:
    evidence = EntryEvidence(EntryRules(entries=4))
    for entry, p, wrong in labels:
        evidence.learn(entry, p, wrong)
        assert 0.0 <= evidence.adjusted(entry, p) <= 1.0
        assert len(evidence) <= 4
    again = EntryEvidence.restored(EntryRules(entries=4), json.loads(json.dumps(evidence.plain())))
    assert again.plain() == evidence.plain()


@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.floats(0, 1), max_size=8))
def test_an_entry_keeps_the_order_of_the_judges_words(low: float, high: float, labels: list[float]) -> None:
    evidence = EntryEvidence(EntryRules())
    for wrong in labels:
        evidence.learn(1, 0.8, wrong)
    low, high = sorted((low, high))
    assert evidence.adjusted(1, low) <= evidence.adjusted(1, high)


def test_impossible_rules_and_damaged_states_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        EntryRules(spread=0)
    for damaged in ([[1, 2]], [[1, float("nan"), 1.0, 1]], [3]):
        with pytest.raises(ValueError):
            EntryEvidence.restored(EntryRules(), damaged)  # type: ignore[arg-type]
