"""A shared answer needs independent tenants that agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.sharing import Confirmations, Confirmed, SharingRules, Waiting, agree, gist


def table(**rules: float) -> Confirmations:
    return Confirmations(SharingRules(**rules))  # type: ignore[arg-type]


def test_three_tenants_that_agree_confirm() -> None:
    shared = table()
    assert shared.offer(b"q", b"a", b"42", 0.0) == Waiting(1)
    assert shared.offer(b"q", b"b", b"42", 1.0) == Waiting(2)
    assert shared.offer(b"q", b"c", b"42", 2.0) == Confirmed()
    assert len(shared) == 0


def test_one_tenant_has_one_voice_its_last() -> None:
    shared = table()
    for _ in range(10):
        assert shared.offer(b"q", b"a", b"poison", 0.0) == Waiting(1)
    shared.offer(b"q", b"b", b"42", 0.0)
    shared.offer(b"q", b"a", b"42", 0.0)
    assert shared.offer(b"q", b"c", b"42", 0.0) == Confirmed()


def test_disagreement_is_not_counted_and_does_not_block() -> None:
    shared = table()
    shared.offer(b"q", b"a", b"poison", 0.0)
    shared.offer(b"q", b"b", b"42", 0.0)
    assert shared.offer(b"q", b"c", b"41", 0.0) == Waiting(1)
    shared.offer(b"q", b"d", b"42", 0.0)
    assert shared.offer(b"q", b"e", b"42", 0.0) == Confirmed()


def test_old_voices_expire() -> None:
    shared = table(window=10.0)
    shared.offer(b"q", b"a", b"42", 0.0)
    shared.offer(b"q", b"b", b"42", 8.0)
    assert shared.offer(b"q", b"c", b"42", 11.0) == Waiting(2)


def test_one_is_enough_where_the_settings_say_so() -> None:
    assert table(tenants=1).offer(b"q", b"a", b"42", 0.0) == Confirmed()


def test_a_flood_pushes_out_its_own_questions_only() -> None:
    shared = table(questions=100, per_tenant=10)
    shared.offer(b"q", b"a", b"42", 0.0)
    for number in range(1000):
        shared.offer(b"%d" % number, b"flood", b"x", 1.0)
    shared.check()
    assert len(shared) == 11
    shared.offer(b"q", b"b", b"42", 2.0)
    assert shared.offer(b"q", b"c", b"42", 2.0) == Confirmed()


def test_forgetting_begins_anew() -> None:
    shared = table(tenants=2)
    shared.offer(b"q", b"a", b"42", 0.0)
    shared.forget(b"q")
    shared.forget(b"never asked")
    assert shared.offer(b"q", b"b", b"42", 0.0) == Waiting(1)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 5), st.sampled_from([b"x", b"y"]), st.floats(0, 100)), max_size=80
    )
)
def test_bounds_hold_and_only_agreeing_tenants_confirm(offers: list[tuple[int, int, bytes, float]]) -> None:
    shared = table(tenants=3, window=50.0, questions=4, per_tenant=2)
    said: dict[int, dict[int, bytes]] = {}
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Paris.", "paris"),
        ("The capital of France is Paris.", "The capital of France is Paris"),
        (
            "Boil the egg for eight minutes, then cool it in cold water before you peel it.",
            "Boil the egg for eight minutes, then cool it in cold water before peeling it.",
        ),
        ("long " * 1000, "Long, " * 1000),
        ("東京です。", "東京です"),
    ],
)
def test_answers_that_agree(one: str, other: str) -> None:
    assert agree(gist(one), gist(other))
    assert agree(gist(other), gist(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"),
        ("", ""),
        ("It is safe to take both of them together.", "It is not safe to take both of them together."),
        ("It isn't safe to take both of them together.", "It is safe to take both of them together."),
        ("You may take up to 4 tablets within one day.", "You may take up to 8 tablets within one day."),
        ("Call the hotline at 555-0100 to get your refund.", "Call the hotline at 555-0199 to get your refund."),
        ("Berlin is larger than Paris", "Paris is larger than Berlin"),
        ("word " * 1000, "word " * 1001),
        ("word " * 1000, "word"),
    ],
)
def test_answers_that_do_not(one: str, other: str) -> None:
    assert not agree(gist(one), gist(other))


@given(st.text(max_size=3000), st.text(max_size=3000))
def test_any_two_answers_can_be_compared_either_way(one: str, other: str) -> None:
    assert len(gist(one)) <= 1024
    assert agree(gist(one), gist(other)) == agree(gist(other), gist(one))
