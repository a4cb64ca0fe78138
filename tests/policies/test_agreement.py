"""Whether two answers say the same."""

from __future__ import annotations

import pytest

from policies.agreement import DIFFERENT, SAME, between, by_similarity, by_words

LONG = "word " * 50


@pytest.mark.parametrize(
    ("one", "two", "wrong"),
    [
        ("Paris.", "paris", 0.0),
        ("The capital of France is Paris.", "The capital of France is Paris!", 0.0),
        ("Paris.", "Berlin.", None),
        ("It costs 5 euros in all shops.", "It costs 6 euros in all shops.", None),
        ("You can do that at any time.", "You can not do that at any time.", None),
        ("", "", None),
    ],
)
def test_words_alone(one: str, two: str, wrong: float | None) -> None:
    assert by_words(one, two) == wrong


@pytest.mark.parametrize(
    ("one", "two", "cosine", "wrong"),
    [
        ("a", "b", SAME, 0.0),
        ("a", "b", DIFFERENT - 0.01, 1.0),
        ("a", "b", 0.7, None),
        ("about 5", "about 6", 0.99, None),
        ("in 1999.", "in 1999", 0.99, 0.0),
        (f"{LONG} 5", f"{LONG} 6", 0.99, 0.0),
    ],
)
def test_similarity(one: str, two: str, cosine: float, wrong: float | None) -> None:
    assert by_similarity(one, two, cosine) == wrong


def test_the_last_guess_is_straight_and_doubts_other_figures() -> None:
    assert between("a", "b", SAME) == 0.0
    assert between("a", "b", DIFFERENT) == 1.0
    assert between("a", "b", (SAME + DIFFERENT) / 2) == pytest.approx(0.5)
    assert between("5", "6", 0.99) == 0.5
