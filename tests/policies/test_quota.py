from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.quota import Quota, allowances, check_quotas

CODE = {"code": Quota(0.2, 0.5)}


@pytest.mark.parametrize("shares", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_impossible_shares_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="min"):
        Quota(*shares)


def test_guarantees_beyond_the_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="120%"):
        check_quotas({"a": Quota(0.6), "b": Quota(0.6)})
    check_quotas({"a": Quota(0.6), "b": Quota(0.4)})


def test_what_exceeds_its_cap_goes_first() -> None:
    over, borrowed, own = allowances({"code": 700, "chat": 300}, CODE, 1000)
    assert (over, borrowed, own) == ({"code": 200}, {"code": 300, "chat": 300}, {})


def test_a_guarantee_is_left_alone() -> None:
    assert allowances({"code": 200, "chat": 800}, CODE, 1000) == ({}, {"chat": 800}, {})


def test_a_category_may_replace_its_own() -> None:
    assert allowances({"code": 200}, CODE, 1000, incoming="code")[2] == {"code": 200}
    assert allowances({"chat": 200}, CODE, 1000, incoming="code")[2] == {}


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 10_000)),
    st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.floats(0, 0.25), st.floats(0.25, 1)).map(lambda s: Quota(*s))
    ),
    st.integers(1, 20_000),
)
def test_nobody_is_pushed_below_the_guarantee(usage: dict[str, int], quotas: dict[str, Quota], budget: int) -> None:
    over, borrowed, own = allowances(usage, quotas, budget)
    assert not own
    for category, used in usage.items():
        taken = over.get(category, 0) + borrowed.get(category, 0)
        floor = int(quotas.get(category, Quota()).min_share * budget)
        assert used - taken == min(used, floor)
