"""A few seconds of the soak, and what it would say of an engine that is not as it should be."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from loadtest.engine.process import serving
from loadtest.engine.soak import Load, Report, soak

SHORT = Load(minutes=0.15, clients=6, burst=40, pause=2, growth=float("inf"))
"""Too short to judge memory."""


def test_every_request_is_answered_or_refused_and_no_block_is_lost() -> None:
    with serving("--model", "bundled", "--dtype", "float32", "--threads", "1", *SHORT.engine) as served:
        report = asyncio.run(soak(served, SHORT))
    assert report.failures == []
    assert set(report.outcomes) == {"answered", "given up", "refused: wrong", "refused: full"}
    assert sum(report.outcomes.values()) == report.sent
    assert report.cached_tokens > 0
    assert report.blocks["cached"] > 0


SOUND = Report(
    minutes=1,
    sent=10,
    outcomes={"answered": 10},
    problems=(),
    lost=0,
    memory_mib=(100, 101),
    growth=0.1,
    allowed_growth=0.5,
    blocks={"free": 3, "cached": 7, "used": 0, "total": 10},
    preemptions=0,
    cached_tokens=5,
    check_failures=0,
)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (SOUND, []),
        (replace(SOUND, lost=2), ["2 of 10 requests were lost"]),
        (replace(SOUND, growth=0.7), ["memory grows by 0.70 MiB a minute"]),
        (
            replace(SOUND, blocks={"free": 3, "cached": 6, "used": 1, "total": 10}),
            ["blocks leaked: {'free': 3, 'cached': 6, 'used': 1, 'total': 10}"],
        ),
        (replace(SOUND, check_failures=1), ["the blocks' books were wrong 1 times"]),
        (replace(SOUND, problems=("a stream broke",)), ["a stream broke"]),
    ],
)
def test_each_thing_that_does_not_hold_is_named(report: Report, said: list[str]) -> None:
    assert report.failures == said
