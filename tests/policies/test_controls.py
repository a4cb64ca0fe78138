"""Request controls."""

from __future__ import annotations

import pytest

from policies.controls import PLAIN, ControlError, Controls, Mode, parse_controls


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, PLAIN),
        ({"cache-control": "no-cache"}, Controls(no_cache=True)),
        ({"cache-control": "No-Store , max-age=60"}, Controls(no_store=True, max_age=60)),
        ({"cache-control": 'only-if-cached, stale-if-error="30"'}, Controls(only_if_cached=True, stale_if_error=30)),
        ({"cache-control": "max-stale=5, no-transform"}, PLAIN),
        ({"x-hitpath-mode": " Exact"}, Controls(mode=Mode.EXACT)),
        ({"x-hitpath-ttl": "5m"}, Controls(ttl=300)),
        ({"x-hitpath-ttl": "90"}, Controls(ttl=90)),
        ({"x-hitpath-threshold": "0.97"}, Controls(threshold=0.97)),
        (
            {"x-hitpath-namespace": "team a", "x-hitpath-category": "code"},
            Controls(namespace="team a", category="code"),
        ),
    ],
)
def test_controls_are_read(headers: dict[str, str], expected: Controls) -> None:
    assert parse_controls(headers) == expected


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("cache-control", "max-age=soon"),
        ("cache-control", "max-age"),
        ("cache-control", "stale-if-error=-1"),
        ("x-hitpath-mode", "fuzzy"),
        ("x-hitpath-ttl", "5 parsecs"),
        ("x-hitpath-threshold", "1.1"),
        ("x-hitpath-threshold", "nan"),
        ("x-hitpath-threshold", "high"),
        ("x-hitpath-namespace", "a\x00b"),
        ("x-hitpath-namespace", "a" * 257),
    ],
)
def test_a_wrong_control_is_named(header: str, value: str) -> None:
    with pytest.raises(ControlError) as raised:
        parse_controls({header: value})
    assert raised.value.header == header


def test_the_stricter_mode_wins() -> None:
    assert Mode.SEMANTIC.stricter(Mode.EXACT) is Mode.EXACT
    assert Mode.OFF.stricter(Mode.EXACT) is Mode.OFF
