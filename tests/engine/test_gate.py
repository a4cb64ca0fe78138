"""Reuse is switched off by checks that cost too much, not by chance, and comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.reuse.gate import Gate


def checks_until_closed(gate: Gate, kl: float, wrong: float, most: int, seed: int = 0) -> int:
    rng = np.random.default_rng(seed)
    for count in range(most):
        if not gate.open:
            return count
        gate.observe(float(rng.exponential(kl)), rng.random() >= wrong)
    return most


def closed() -> Gate:
    gate = Gate(0.05, 0.95)
    while gate.open:
        gate.observe(1.0, False)
    return gate


def test_it_begins_open_and_knows_nothing() -> None:
    figures = Gate(0.05, 0.95).figures()
    assert figures.open
    assert (figures.checks, figures.kl.low, figures.kl.high) == (0, 0.0, math.inf)


def test_losses_within_the_stated_ones_do_not_close_it() -> None:
    wrongly = sum(checks_until_closed(Gate(0.05, 0.95), 0.045, 0.04, 300, seed) < 300 for seed in range(20))
    assert wrongly <= 6  # once in a thousand checks is stated; this is far within


@pytest.mark.parametrize(("kl", "wrong", "most"), [(0.5, 0.0, 40), (0.15, 0.0, 150), (0.0, 0.5, 20), (0.0, 0.2, 120)])
def test_too_large_losses_close_it(kl: float, wrong: float, most: int) -> None:
    found = [checks_until_closed(Gate(0.05, 0.95), kl, wrong, 400, seed) for seed in range(8)]
    assert max(found) < most


def test_long_good_times_do_not_delay_it() -> None:
    gate = Gate(0.05, 0.95)
    for _ in range(5000):
        gate.observe(0.001, True)
    assert checks_until_closed(gate, 0.5, 0.3, 100) < 40


def test_good_checks_open_it_again_and_all_is_told() -> None:
    gate = closed()
    assert gate.figures().closings == gate.closings == 1
    changes = [gate.observe(0.002, True) for _ in range(600)]
    assert sum(changes) == 1
    assert gate.open
    assert 50 < changes.index(True) < 250
    figures = gate.figures()
    assert figures.kl.mean == pytest.approx(0.002)
    assert figures.kl.low <= 0.002 < figures.kl.high <= 0.05
    assert figures.disagreement.mean == 0.0


def test_bad_checks_leave_it_closed() -> None:
    gate = closed()
    assert not any(gate.observe(0.002, index % 10 != 0) for index in range(300))
    assert not gate.open


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60))
@settings(max_examples=30)
def test_bounds_never_contradict_each_other(seen: list[tuple[float, bool]]) -> None:
    gate = Gate(0.05, 1.0)
    for kl, agrees in seen:
        was = gate.open
        assert gate.observe(kl, agrees) == (gate.open != was)
        for bounds in (gate.figures().kl, gate.figures().disagreement):
            assert bounds.mean >= 0
            assert bounds.low >= 0


def test_what_cannot_be_kept_is_refused() -> None:
    for arguments in ((0.0, 0.9), (0.1, 0.0), (math.inf, 0.9), (math.nan, 0.9)):
        with pytest.raises(ValueError, match="a gate needs"):
            Gate(*arguments)
    for kl in (-0.1, math.nan):
        with pytest.raises(ValueError, match="not a divergence"):
            Gate(0.1, 0.9).observe(kl, True)
