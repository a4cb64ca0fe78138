import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.pairhead import PairHead, Weights

HEAD = PairHead(
    with_cosine=Weights(1.0, 4.0, -4.0),
    without_cosine=Weights(1.0, 0.0, -1.0),
    categories={"code": -1.0},
    points=((0.01, 0.9), (0.02, 0.8)),
    category_points={"math": ((0.01, 0.7), (0.02, 0.6))},
)
FINITE = st.floats(-1e6, 1e6)


def test_a_probability_by_hand() -> None:
    assert HEAD.probability(2.0, 0.5, "general") == pytest.approx(0.5)
    assert HEAD.probability(3.0, 0.5, "code") == pytest.approx(0.5)
    assert HEAD.probability(1.0, None, "general") == pytest.approx(0.5)


@given(FINITE, st.none() | st.floats(-1.0, 1.0), st.sampled_from(["code", "general"]))
def test_a_probability_stays_between_none_and_all(logit: float, cosine: float | None, category: str) -> None:
    assert 0 <= HEAD.probability(logit, cosine, category) <= 1
    assert HEAD.probability(logit, cosine, category) <= HEAD.probability(logit + 1, cosine, category)


def test_a_point_by_hand() -> None:
    assert HEAD.point(0.01, "general") == 0.9
    assert HEAD.point(0.015, "general") == pytest.approx(0.85)
    assert HEAD.point(0.5, "general") == 0.8
    assert HEAD.point(0.005, "general") == pytest.approx(0.95)
    assert HEAD.point(0.0, "general") == 1.0
    assert HEAD.point(0.01, "math") == 0.7


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["general", "math"]))
def test_a_larger_budget_never_asks_for_more(one: float, other: float, category: str) -> None:
    small, large = sorted((one, other))
    assert HEAD.point(small, category) >= HEAD.point(large, category) or math.isclose(small, large)
