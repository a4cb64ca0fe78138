"""The budget is kept on simulated streams; the command prints what was measured."""

from __future__ import annotations

import orjson
import pytest

from loadtest.simulate_budget import POINTS, main, over_time, simulate, stream, summary


def test_streams_are_drawn_from_their_seed() -> None:
    one, two = stream(3, 500), stream(3, 500)
    assert (one.p == two.p).all()
    assert (one.wrong == two.wrong).all()
    assert one.judge == two.judge


@pytest.mark.parametrize("budget", [0.02, 0.05])
def test_the_budget_is_kept_and_hits_are_not_thrown_away(budget: float) -> None:
    outcomes = simulate(budget, 24, 8000, 50_000)
    found = summary(budget, 8000, outcomes)
    assert found.kept >= 0.9
    assert found.error <= budget
    assert found.of_oracle >= 0.1
    assert found.believed_kept < found.kept
    assert len(over_time(outcomes)["p95"]) == POINTS


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--streams", "2", "--lookups", "2000", "--budget", "0.05"]) == 0
    assert "| budget | kept |" in capsys.readouterr().out
    assert main(["--streams", "2", "--lookups", "2000", "--budget", "0.05", "--json"]) == 0
    document = orjson.loads(capsys.readouterr().out)
    assert document["budgets"][0]["streams"] == 2
    assert len(document["over_time"]["0.05"]["median"]) == POINTS
