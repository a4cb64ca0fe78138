"""A shared answer needs independent tenants that agree."""

from __future__ import annotations

from operator import eq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.sharing import Confirmations, Confirmed, SharingRules, Waiting


def table(**rules: float) -> Confirmations[str]:
    return Confirmations(SharingRules(**rules), eq)  # type: ignore[arg-type]


def test_three_tenants_that_agree_confirm() -> None:
    shared = table()
    assert shared.offer(b"q", b"a", "42", 0.0) == Waiting(1)
    assert shared.offer(b"q", b"b", "42", 1.0) == Waiting(2)
    assert shared.offer(b"q", b"c", "42", 2.0) == Confirmed()
    assert len(shared) == 0


def test_one_tenant_has_one_voice_its_last() -> None:
    shared = table()
    for _ in range(10):
        assert shared.offer(b"q", b"a", "poison", 0.0) == Waiting(1)
    shared.offer(b"q", b"b", "42", 0.0)
    shared.offer(b"q", b"a", "42", 0.0)
    assert shared.offer(b"q", b"c", "42", 0.0) == Confirmed()


def test_disagreement_is_not_counted_and_does_not_block() -> None:
    shared = table()
    shared.offer(b"q", b"a", "poison", 0.0)
    shared.offer(b"q", b"b", "42", 0.0)
    assert shared.offer(b"q", b"c", "41", 0.0) == Waiting(1)
    shared.offer(b"q", b"d", "42", 0.0)
    assert shared.offer(b"q", b"e", "42", 0.0) == Confirmed()


def test_old_voices_expire() -> None:
    shared = table(window=10.0)
    shared.offer(b"q", b"a", "42", 0.0)
    shared.offer(b"q", b"b", "42", 8.0)
    assert shared.offer(b"q", b"c", "42", 11.0) == Waiting(2)


def test_one_is_enough_where_the_settings_say_so() -> None:
    assert table(tenants=1).offer(b"q", b"a", "42", 0.0) == Confirmed()


def test_a_flood_pushes_out_its_own_questions_only() -> None:
    shared = table(questions=100, per_tenant=10)
    shared.offer(b"q", b"a", "42", 0.0)
    for number in range(1000):
        shared.offer(b"%d" % number, b"flood", "x", 1.0)
    shared.check()
    assert len(shared) == 11
    shared.offer(b"q", b"b", "42", 2.0)
    assert shared.offer(b"q", b"c", "42", 2.0) == Confirmed()


def test_forgetting_begins_anew() -> None:
    shared = table(tenants=2)
    shared.offer(b"q", b"a", "42", 0.0)
    shared.forget(b"q")
    shared.forget(b"never asked")
    assert shared.offer(b"q", b"b", "42", 0.0) == Waiting(1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.sampled_from("xy"), st.floats(0, 100)), max_size=80))
def test_bounds_hold_and_only_agreeing_tenants_confirm(offers: list[tuple[int, int, str, float]]) -> None:
    shared = table(tenants=3, window=50.0, questions=4, per_tenant=2)
    said: dict[int, dict[int, str]] = {}
    for question, tenant, answer, now in offers:
        said.setdefault(question, {})[tenant] = answer
        verdict = shared.offer(bytes([question]), bytes([tenant]), answer, now)
        shared.check()
        if verdict == Confirmed():
            assert sum(other == answer for other in said[question].values()) >= 3


def test_impossible_rules_are_refused() -> None:
    for wrong in ({"tenants": 0}, {"per_tenant": 0}, {"questions": 1}):
        with pytest.raises(ValueError, match="sharing"):
            SharingRules(**wrong)
