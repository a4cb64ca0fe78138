"""The category table, rules, admission, the threshold judge and the token bucket."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from policies.admission import admit
from policies.category import CallFacts, CategoryPolicy, CategoryTable, Rule, UnknownCategoryError
from policies.controls import PLAIN, Controls, Mode
from policies.judge import Accepted, Candidate, Judge, Refused, Stage, ThresholdJudge, Verdict
from policies.ratelimit import TokenBucket
from policies.reasons import Miss, NotStored

DEFAULT = CategoryPolicy("default")


def facts(system: str = "", user: str = "", model: str = "m") -> Callable[[], CallFacts]:
    return lambda: CallFacts("chat", model, "acme", system, user)


def test_built_in_caution_only_makes_the_default_stricter() -> None:
    loose = CategoryTable(CategoryPolicy("default", threshold=0.5, ttl=1e9), {}).policies
    strict = CategoryTable(CategoryPolicy("default", threshold=0.99, ttl=1.0, mode=Mode.OFF), {}).policies
    assert loose["finance"].threshold == 0.95
    assert loose["finance"].ttl == 3600
    assert loose["general"].threshold == 0.5
    assert all(policy.threshold == 0.99 and policy.ttl == 1.0 for policy in strict.values())
    assert all(policy.mode is Mode.OFF for policy in strict.values())


def test_the_operator_has_the_last_word() -> None:
    table = CategoryTable(DEFAULT, {"math": {"mode": Mode.SEMANTIC}, "recipes": {"ttl": 5.0}})
    assert table.policies["math"].mode is Mode.SEMANTIC
    assert table.policies["recipes"].ttl == 5.0


def test_header_then_the_first_rule_that_matches() -> None:
    rules = [
        Rule("code", system_contains="Coding Assistant"),
        Rule("finance", system_contains="assistant", user_contains="price"),
        Rule("medical", model="doc"),
    ]
    table = CategoryTable(DEFAULT, {}, rules)

    def name(controls: Controls = PLAIN, **known: str) -> str | None:
        decided = table.decided(controls, facts(**known))
        return None if decided is None else decided.name

    assert name(system="you are a coding assistant", user="the price?") == "code"
    assert name(system="an assistant", user="the PRICE?") == "finance"
    assert name(system="an assistant") is None
    assert name(model="doc") == "medical"
    assert name(Controls(category="travel"), model="doc") == "travel"
    with pytest.raises(UnknownCategoryError, match="code, "):
        name(Controls(category="nope"))


def test_rules_are_not_shown_a_call_when_there_are_none() -> None:
    def never() -> CallFacts:
        raise AssertionError

    assert CategoryTable(DEFAULT, {}).decided(PLAIN, never) is None


def test_a_client_may_be_stricter_but_not_laxer() -> None:
    policy = CategoryPolicy("code", threshold=0.9, mode=Mode.EXACT)
    assert policy.under(Controls(threshold=0.5)).threshold == 0.9
    assert policy.under(Controls(threshold=0.95)).threshold == 0.95
    assert policy.under(Controls(mode=Mode.SEMANTIC)).mode is Mode.EXACT
    assert policy.under(Controls(mode=Mode.OFF)).mode is Mode.OFF
    assert policy.under(Controls(ttl=7)).ttl == 7


def test_what_the_classifier_does_not_know_falls_back() -> None:
    assert CategoryTable(DEFAULT, {}).learned("astrology").name == "general"


@pytest.mark.parametrize(
    ("refusal", "policy", "controls", "expected"),
    [
        (None, DEFAULT, PLAIN, None),
        (NotStored.TRUNCATED, DEFAULT, PLAIN, NotStored.TRUNCATED),
        (None, CategoryPolicy("x", ttl=0), PLAIN, NotStored.EXPIRED_AT_ONCE),
        (None, CategoryPolicy("x", mode=Mode.OFF), PLAIN, NotStored.FORBIDDEN),
        (None, DEFAULT, Controls(no_store=True), NotStored.FORBIDDEN),
    ],
)
def test_admission(
    refusal: NotStored | None, policy: CategoryPolicy, controls: Controls, expected: NotStored | None
) -> None:
    assert admit(refusal, policy, controls) is expected


async def test_the_threshold_judge() -> None:
    judge: Judge = ThresholdJudge()
    near, far, edge = Candidate(1, "a", 0.95), Candidate(2, "b", 0.85), Candidate(3, "c", 0.9)
    for shown, accepted in (([near, far], True), ([edge], True), ([far], False)):
        verdicts = (Verdict(shown[0], Stage.SIMILARITY, accepted),)
        found = await judge.judge("q", shown, DEFAULT)
        similarity = shown[0].similarity
        refused = Refused(Miss.BELOW_THRESHOLD, similarity, verdicts)
        assert found == (Accepted(shown[0], similarity, verdicts) if accepted else refused)
    assert await judge.judge("q", [], DEFAULT) == Refused(Miss.NO_NEIGHBOUR, -1.0)


def test_the_bucket_admits_its_rate_and_says_how_long_to_wait() -> None:
    bucket = TokenBucket(2.0)
    assert [bucket.take(10.0), bucket.take(10.0)] == [0.0, 0.0]
    assert bucket.take(10.0) == pytest.approx(0.5)
    assert bucket.take(10.5) == 0.0
    slow = TokenBucket(0.1)
    assert slow.take(0.0) == 0.0
    assert slow.take(0.0) == pytest.approx(10.0)
