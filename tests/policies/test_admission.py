"""What is kept, for how long, and what an example makes of a call."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import admit, lifetime
from policies.category import CategoryPolicy
from policies.controls import Controls, Mode
from policies.examples import with_example
from policies.freshness import FreshnessRules, Horizon, Sightings
from policies.reasons import NotStored

PLAIN, ASKED = CategoryPolicy("any"), Controls()


@pytest.mark.parametrize(
    ("policy", "controls", "horizon", "missed", "expected"),
    [
        (PLAIN, ASKED, Horizon.NONE, 1, None),
        (PLAIN, ASKED, Horizon.DAY, 1, None),
        (PLAIN, ASKED, Horizon.NOW, 1, NotStored.VOLATILE),
        (PLAIN, Controls(ttl=3600.0), Horizon.NOW, 1, NotStored.VOLATILE),
        (PLAIN, Controls(no_store=True), Horizon.NOW, 1, NotStored.FORBIDDEN),
        (CategoryPolicy("any", mode=Mode.OFF), ASKED, Horizon.NONE, 1, NotStored.FORBIDDEN),
        (CategoryPolicy("any", ttl=0.0), ASKED, Horizon.NONE, 1, NotStored.EXPIRED_AT_ONCE),
        (CategoryPolicy("any", admit_after=3), ASKED, Horizon.NONE, 2, NotStored.TOO_SELDOM),
        (CategoryPolicy("any", admit_after=3), ASKED, Horizon.NONE, 3, None),
    ],
)
def test_what_is_kept(
    policy: CategoryPolicy, controls: Controls, horizon: Horizon, missed: int, expected: NotStored | None
) -> None:
    assert admit(None, policy.under(controls), controls, horizon=horizon, missed=missed) is expected


def test_a_fault_of_the_answer_goes_before_a_count() -> None:
    policy = CategoryPolicy("any", admit_after=3)
    assert admit(NotStored.TRUNCATED, policy, ASKED, missed=1) is NotStored.TRUNCATED


@given(st.floats(1.0, 1e6), st.sampled_from(Horizon), st.floats(0.0, 1.0, exclude_max=True), st.floats(0.0, 0.9))
def test_nothing_lives_longer_than_it_may(ttl: float, horizon: Horizon, draw: float, jitter: float) -> None:
    policy = CategoryPolicy("any", ttl=ttl, ttl_jitter=jitter, freshness=FreshnessRules(now=5.0))
    lives = lifetime(policy, ASKED, horizon, draw)
    assert 0.0 < lives <= policy.freshness.ttl(ttl, horizon) <= ttl
    asked = Controls(ttl=ttl)
    assert lifetime(policy.under(asked), asked, horizon, draw) == policy.freshness.ttl(ttl, horizon)


def test_sightings_can_be_asked_without_counting() -> None:
    seen = Sightings()
    assert seen.seen(b"k" * 16) == 0
    assert seen.missed(b"k" * 16) == 1
    assert seen.seen(b"k" * 16) == seen.seen(b"k" * 16) == 1


def test_an_example_stands_before_the_question() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    shown = with_example({"model": "large", "messages": turns, "stream": True}, "near q", "near a", "small")
    assert shown == {
        "model": "small",
        "stream": True,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "near q"},
            {"role": "assistant", "content": "near a"},
            {"role": "user", "content": "q"},
        ],
    }
    assert turns == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": "x"}, {"prompt": "x"}])
def test_a_body_without_turns_takes_none(body: dict[str, Any]) -> None:
    assert with_example(body, "q", "a", "small") is None


def test_an_empty_answer_is_no_example() -> None:
    assert with_example({"messages": [{"role": "user", "content": "q"}]}, "q", " ", "small") is None
