"""The ledger against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachestore.kv.ledger import Key, Ledger

KEYS = [(salt, bytes([n])) for salt in ("a", "b") for n in range(5)]
steps = st.lists(
    st.tuples(
        st.sampled_from(["admit", "touch", "forget", "pin", "unpin", "give_up"]),
        st.sampled_from(KEYS),
        st.integers(0, 60),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(steps, st.one_of(st.none(), st.integers(0, 80)))
def test_it_adds_up_whatever_happens(steps: list[tuple[str, Key, int]], quota: int | None) -> None:
    ledger = Ledger(100, quota)
    pins: dict[Key, int] = {}
    for what, key, size in steps:
        before = {one: ledger.size(one) for one in ledger}
        match what:
            case "admit":
                victims = ledger.admit(key, size)
                if victims is None:
                    assert {one: ledger.size(one) for one in ledger} == before
                else:
                    assert ledger.size(key) == size
                    assert not any(pins.get(victim) for victim in victims)
                    assert set(before) - set(victims) | {key} == set(ledger)
            case "touch":
                ledger.touch(key)
                assert key not in ledger or list(ledger)[-1] == key
            case "forget":
                ledger.forget(key)
                pins.pop(key, None)
            case "pin" if key in ledger:
                ledger.pin(key)
                pins[key] = pins.get(key, 0) + 1
            case "unpin" if pins.get(key):
                ledger.unpin(key)
                pins[key] -= 1
            case "give_up":
                victims = ledger.give_up(size)
                assert not any(pins.get(victim) for victim in victims)
            case _:
                pass
        assert ledger.check() == []
        assert ledger.pinned() == sum(pins.values())
        assert ledger.total == sum(map(ledger.size, ledger))


def test_a_tenant_pays_for_itself_first() -> None:
    ledger = Ledger(100, quota=50)
    for n in range(5):
        ledger.admit(("a", bytes([n])), 10)
    ledger.admit(("b", b"x"), 40)
    assert ledger.admit(("a", b"new"), 20) == [("a", b"\0"), ("a", b"\1")]
    assert ledger.admit(("b", b"y"), 60) is None
    assert not ledger.fits(60)
    assert ledger.used("b") == 40


def test_it_says_what_is_wrong() -> None:
    ledger = Ledger(100)
    ledger.admit(KEYS[0], 10)
    ledger.total = 9
    assert len(ledger.check()) == 1


@pytest.mark.parametrize(("capacity", "quota"), [(-1, None), (1, -1)])
def test_impossible_bounds(capacity: int, quota: int | None) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Ledger(capacity, quota)
