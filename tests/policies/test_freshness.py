"""How long an answer stays true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.freshness import (
    FreshnessRules,
    Horizon,
    Serving,
    Sightings,
    horizon,
    jittered,
    serving,
    worth_keeping,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the stock price of Apple?", Horizon.NOW),
        ("What's the weather in Paris?", Horizon.NOW),
        ("latest iPhone model", Horizon.NOW),
        ("Who is winning?", Horizon.NOW),
        ("What is the score of the game?", Horizon.NOW),
        ("Who is the current president of France?", Horizon.NOW),
        ("What time is it?", Horizon.NOW),
        ("100 USD to EUR", Horizon.NOW),
        ("What is the exchange rate of the yen?", Horizon.NOW),
        ("Is the store open now?", Horizon.NOW),
        ("Wie ist das Wetter?", Horizon.NOW),
        ("quelle heure est-il", Horizon.NOW),
        ("какая погода", Horizon.NOW),
        ("今天天气怎么样", Horizon.NOW),
        ("东京の株価", Horizon.NOW),
        ("What happened today?", Horizon.DAY),
        ("Was läuft heute im Kino?", Horizon.DAY),
        ("what’s on tonight", Horizon.DAY),
        ("今日の予定", Horizon.DAY),
        ("events this week", Horizon.WEEK),
        ("What opens next Friday?", Horizon.WEEK),
        ("esta semana", Horizon.WEEK),
        ("best films of this year", Horizon.YEAR),
        ("recent advances in physics", Horizon.YEAR),
        ("What is the capital of France?", Horizon.NONE),
        ("How does electric current flow?", Horizon.NONE),
        ("What is the time complexity of quicksort?", Horizon.NONE),
        ("Who won the 1998 World Cup?", Horizon.NONE),
        ("How do I know if an egg is good?", Horizon.NONE),
        ("", Horizon.NONE),
        ("\ud800", Horizon.NONE),
    ],
)
def test_the_soonest_horizon_counts(text: str, expected: Horizon) -> None:
    assert horizon(text) is expected


@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    assert horizon(text) in Horizon


@given(st.floats(0, 1e7), st.sampled_from(Horizon))
def test_a_horizon_only_shortens(ttl: float, level: Horizon) -> None:
    assert FreshnessRules().ttl(ttl, level) <= ttl
    assert FreshnessRules().ttl(ttl, Horizon.NONE) == ttl


def test_a_sooner_horizon_is_at_least_as_strict() -> None:
    lives = [FreshnessRules().ttl(1e9, level) for level in Horizon]
    assert lives == sorted(lives, reverse=True)
    assert lives[-1] == 0.0


@given(st.floats(0, 1e9), st.floats(0, 0.99), st.floats(0, 0.999))
def test_jitter_only_shortens_and_by_no_more_than_its_share(ttl: float, share: float, draw: float) -> None:
    assert ttl * (1 - share) <= jittered(ttl, share, draw) * (1 + 1e-12)
    assert jittered(ttl, share, draw) <= ttl


def test_a_jitter_beyond_the_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        jittered(1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("late", "accepted", "expected"),
    [
        (-1.0, 0.0, Serving.FRESH),
        (0.0, 0.0, Serving.REVALIDATE),
        (9.0, 0.0, Serving.REVALIDATE),
        (10.0, 0.0, Serving.ON_ERROR),
        (60.0, 0.0, Serving.EXPIRED),
        (60.0, 100.0, Serving.ON_ERROR),
        (100.0, 100.0, Serving.EXPIRED),
    ],
)
def test_what_an_answer_is_good_for(late: float, accepted: float, expected: Serving) -> None:
    found = serving(1000.0 + late, 1000.0, while_revalidate=10.0, if_error=max(60.0, accepted))
    assert found is expected


def test_without_rules_what_is_late_is_gone() -> None:
    assert serving(0.0, 0.0, while_revalidate=0.0, if_error=0.0) is Serving.EXPIRED


def key(number: int) -> bytes:
    return number.to_bytes(16, "little") if number >= 2**96 else bytes([number % 256]) * 16


@given(st.lists(st.integers(0, 20), max_size=200))
def test_sightings_are_never_too_few(numbers: list[int]) -> None:
    sightings = Sightings(width=8, window=1000)
    true: dict[int, int] = {}
    for number in numbers:
        true[number] = true.get(number, 0) + 1
        assert sightings.missed(key(number)) >= true[number]


def test_sightings_age_and_never_overflow() -> None:
    sightings = Sightings(width=64, window=100)
    for _ in range(99):
        sightings.missed(key(1))
    assert sightings.missed(key(1)) == 100
    assert sightings.missed(key(1)) == 51
    many = Sightings(width=64, window=10_000)
    assert [many.missed(key(2)) for _ in range(300)][-1] == 255


def test_a_key_is_a_digest() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Sightings().missed(b"short")
    with pytest.raises(ValueError, match="positive"):
        Sightings(width=0)


def test_admission_after_a_number_of_misses() -> None:
    assert worth_keeping(1, 1)
    assert not worth_keeping(1, 2)
    assert worth_keeping(2, 2)
