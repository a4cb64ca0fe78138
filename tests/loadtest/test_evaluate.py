from pathlib import Path

import orjson
import pytest

from loadtest.evaluate import Outcome, main, report_categories, report_pairs

PAIRS = [
    ("How do I reset my password?", "How do I reset my password??", 1),
    ("What is the capital of France?", "What is the capital city of France?", 1),
    ("How tall is Mount Everest?", "Give me a recipe for apple pie", 0),
    ("Where can I buy a train ticket?", "How do volcanoes erupt?", 0),
    ("unclear", "also unclear", -1),
    ("word " * 500, "word " * 500, 1),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings whose data directory, with the built embedder, serves all tests of this module."""
    folder = tmp_path_factory.mktemp("eval")
    path = folder / "settings.yaml"
    path.write_text(f"data_dir: {folder / 'data'}\n")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps({"a": a, "b": b, "label": label}) for a, b, label in PAIRS))
    return path


def test_a_report_by_hand() -> None:
    outcomes = [Outcome(1, 0.9, True), Outcome(1, 0.4, False), Outcome(0, 0.5, True), Outcome(0, 0.1, False)]
    report = report_pairs("f", outcomes)
    assert (report.pairs, report.positives, report.negatives) == (4, 2, 2)
    assert report.auc == 0.75
    assert report.recall_at_1pct_false == report.recall_at_5pct_false == 0.5
    assert (report.positives_served, report.negatives_served) == (0.5, 0.5)


def test_pairs_go_through_the_lookup_path(config: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pairs", str(pairs), "--config", str(config), "--json"]) == 0
    (report,) = orjson.loads(capsys.readouterr().out)["files"]
    assert report["file"] == str(pairs)
    assert (report["pairs"], report["positives"], report["negatives"]) == (5, 3, 2)
    # Both paraphrases score above both strangers; the text beyond the window can never be served.
    assert report["auc"] == pytest.approx(4 / 6)
    assert report["recall_at_1pct_false"] == pytest.approx(2 / 3)
    assert report["negatives_served"] == 0
    assert 0 < report["positives_served"] <= 2 / 3


def test_served_shares_follow_the_settings(
    config: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text(config.read_text() + "cache: {categories: {general: {mode: exact}}, default: {threshold: 1.0}}\n")
    assert main(["pairs", str(pairs), "--config", str(strict), "--json"]) == 0
    (report,) = orjson.loads(capsys.readouterr().out)["files"]
    assert report["positives_served"] == 0
    assert report["auc"] == pytest.approx(4 / 6)


def test_one_class_alone_leaves_figures_undefined(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "negatives.jsonl"
    path.write_text('{"a": "one thing", "b": "quite another", "label": 0}\n')
    assert main(["pairs", str(path), "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "negatives.jsonl",
        *["1", "0", "1", "-", "-", "-", "-", "0.000"],
    ]


def test_categories_are_counted(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "categories.jsonl"
    rows = [("How do I sort a list in Python?", "code"), ("How do I merge two dicts in Python?", "finance")]
    path.write_bytes(b"\n".join(orjson.dumps({"text": text, "category": name}) for text, name in rows))
    assert main(["categories", str(path), "--config", str(config), "--json"]) == 0
    (report,) = orjson.loads(capsys.readouterr().out)["files"]
    assert (report["rows"], report["accuracy"]) == (2, 0.5)
    assert report["confusion"] == {"code": {"code": 1}, "finance": {"code": 1}}
    assert main(["categories", str(path), "--config", str(config)]) == 0
    assert "accuracy 0.500" in capsys.readouterr().out


def test_a_category_report_by_hand() -> None:
    report = report_categories("f", [("x", "a"), ("y", "a"), ("z", "b")], ["a", "b", "c"])
    assert report.accuracy == pytest.approx(1 / 3)
    assert report.by_category == {"a": 0.5, "b": 0.0}
    assert report.confusion == {"a": {"a": 1, "b": 1}, "b": {"c": 1}}


def test_failures_have_their_exit_codes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense")
    assert main(["pairs", str(bad), "--config", str(config)]) == 1
    assert "bad.jsonl: line 1" in capsys.readouterr().err
    assert main(["pairs", str(tmp_path / "absent"), "--config", str(config)]) == 1
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("cach: {}\n")
    assert main(["pairs", str(bad), "--config", str(wrong)]) == 2
    off = tmp_path / "off.yaml"
    off.write_text("cache: {embedder: {kind: none}}\n")
    assert main(["categories", str(bad), "--config", str(off)]) == 1
    with pytest.raises(SystemExit) as stop:
        main(["pairs"])
    assert stop.value.code == 2


def test_what_is_served_is_the_pairs_own_categorys_business(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, strict = tmp_path / "code.jsonl", tmp_path / "strict.yaml"
    path.write_text('{"a": "How do I sort a list in Python?", "b": "How can I sort a list in Python?", "label": 1}\n')
    strict.write_text(config.read_text() + "cache: {categories: {general: {error_budget: 0}}}\n")
    assert main(["pairs", str(path), "--config", str(strict), "--json"]) == 0
    (report,) = orjson.loads(capsys.readouterr().out)["files"]
    assert report["positives_served"] == 1
