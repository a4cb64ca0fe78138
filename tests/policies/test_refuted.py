"""Pairs that were found wrong."""

from __future__ import annotations

import pytest

from policies.refuted import Refuted, pair


def test_a_pair_has_one_name_whoever_was_first_and_however_it_is_typed() -> None:
    name = pair(b"s", "How old is he?", "What is his age?")
    assert name == pair(b"s", "What is his age?", "How old is he?")
    assert name == pair(b"s", "how  old is he", "What is his age?")
    assert name != pair(b"t", "How old is he?", "What is his age?")
    assert name != pair(b"s", "How old is she?", "What is his age?")
    assert len(pair(b"", "\ud800", "")) == 16


def test_texts_do_not_run_into_each_other() -> None:
    assert pair(b"s", "ab", "c") != pair(b"s", "a", "bc")


def test_the_pair_not_met_for_longest_is_forgotten() -> None:
    known = Refuted(most=2)
    one, two, three = (pair(b"s", "x", str(number)) for number in range(3))
    known.add(one)
    known.add(two)
    assert one in known
    known.add(three)
    assert two not in known
    assert one in known
    assert len(known) == 2


def test_the_state_survives_a_restart() -> None:
    known = Refuted()
    known.add(pair(b"s", "a", "b"))
    assert Refuted.restored(known.plain()).plain() == known.plain()


@pytest.mark.parametrize("plain", [["xyz"], ["00"], [5], 5])
def test_a_damaged_state_is_refused(plain: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Refuted.restored(plain)  # type: ignore[arg-type]
