"""Sizes, durations, shares and rates."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from policies.units import UnitError, duration, rate, share, size


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (size, "2GiB", 2 * 2**30),
        (size, "1.5 MB", 1_500_000),
        (size, 4096, 4096),
        (size, "0", 0),
        (duration, "1d", 86400),
        (duration, "500ms", 0.5),
        (duration, 30, 30),
        (duration, "5m", 300),
        (share, "10%", 0.1),
        (share, 0.25, 0.25),
        (rate, "50/s", 50),
        (rate, "600/m", 10),
    ],
)
def test_what_people_write(parse: Callable[[object], float], text: object, expected: float) -> None:
    assert parse(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (size, "2 GiBs"),
        (size, "-1"),
        (size, ""),
        (size, True),
        (size, float("inf")),
        (size, None),
        (duration, "5 parsecs"),
        (duration, "m"),
        (duration, "١h"),
        (share, "120%"),
        (share, "10 percent"),
        (rate, 50),
        (rate, "50/"),
        (rate, "0/s"),
        (rate, "5/fortnight"),
    ],
)
def test_what_is_refused_is_named(parse: Callable[[object], float], text: object) -> None:
    with pytest.raises(UnitError) as raised:
        parse(text)
    assert repr(text) in str(raised.value)
