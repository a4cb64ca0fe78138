from pathlib import Path

import pytest

from loadtest.evaluate import Outcome, report_pairs
from loadtest.report import BARS, bars_table, main, placed, sets_table

REPORT = report_pairs("qqp", [Outcome(1, 0.9, True), Outcome(1, 0.8, False), Outcome(0, 0.1, False)])


def test_a_table_is_put_between_its_marks_again_and_again() -> None:
    page = "a\n<!-- one -->\n<!-- end -->\nb\n<!-- two -->\nold\n<!-- end -->\n"
    once = placed(page, "one", "| x |")
    assert once == "a\n<!-- one -->\n| x |\n<!-- end -->\nb\n<!-- two -->\nold\n<!-- end -->\n"
    assert placed(once, "one", "| y |") == once.replace("x", "y")
    with pytest.raises(ValueError, match="there is no <!-- three -->"):
        placed(page, "three", "")


def test_every_bar_has_a_line() -> None:
    lines = bars_table({"qqp": REPORT}).splitlines()
    assert len(lines) == 2 + len(BARS)
    assert "| qqp | recall at 1pct false | 1.000 | >= 0.300 | yes |" in lines
    assert "| paws_x_en | auc | – | >= 0.800 | – |" in lines


def test_undefined_figures_are_dashes() -> None:
    line = sets_table({"only": report_pairs("only", [Outcome(0, 0.2, True)])}).splitlines()[-1]
    assert line == "| only | 0 | 1 | – | – | – | – | 1.000 |"


def test_without_the_data_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HITPATH_DATA", str(tmp_path / "absent"))
    assert main(["--only", "judge", "--docs", str(tmp_path)]) == 1
    assert "set HITPATH_DATA" in capsys.readouterr().err


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--only", "weather"])
    assert stop.value.code == 2
