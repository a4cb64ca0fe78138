"""Calibration: what prompts it takes, what it chooses, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.__main__ import main
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.errors import SettingsError
from engine.reuse.calibrate import Calibration, Candidate, Findings, Limits, chosen, grid, nearest, table_of
from engine.reuse.examples import question_about, read, sample_of, written
from engine.reuse.point import FILE, load
from engine.reuse.trial import Trial
from engine.settings import parse_calibration
from tests.engine.checkpoints import write

LIMITS = Limits(kl=0.02, agreement=0.9)
NONE, MORE = Candidate("none", 0.0, "mean"), Candidate("sensitive", 0.15, "mean")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("tiny")
    write(directory, max_position_embeddings=1024)
    return load_checkpoint(directory, name="tiny", dtype="float32")


def found(kl: float, agreement: float, time: float, operations: float = 0.1) -> Findings:
    return Findings([kl] * 3, [agreement] * 3, [True] * 3, [time] * 3, [operations] * 3)


def refused(tmp_path: Path, line: str) -> str:
    (tmp_path / "p.jsonl").write_text(json.dumps({"chunks": ["a"], "question": "b"}) + "\n\n" + line + "\n")
    with pytest.raises(SettingsError) as error:
        read(tmp_path / "p.jsonl", 10)
    return str(error.value)


def test_prompts_are_read_in_both_forms(tmp_path: Path, tiny: Checkpoint) -> None:
    parts = [{"type": "text", "text": text} for text in ("one " * 20, "two " * 20, "which?")]
    lines = [
        {"chunks": ["one " * 20, "two " * 20], "question": "which?"},
        {"messages": [{"role": "user", "content": parts}]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ours, theirs = read(tmp_path / "p.jsonl", 5)
    assert ours == theirs
    assert len(read(tmp_path / "p.jsonl", 1)) == 1
    sample = sample_of(ours, tiny.tokenizer, 64)
    assert sample is not None
    assert [tiny.tokenizer.decode(chunk) for chunk in sample.chunks] == [("one " * 20).strip(), ("two " * 20).strip()]
    assert tiny.tokenizer.decode(sample.head) == "[user]"
    assert sample_of(question_about(["short"], "which?"), tiny.tokenizer, 64) is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "p.jsonl:3: not JSON"),
        ("[]", "p.jsonl:3: expected the fields chunks and question, or messages; got list"),
        ('{"chunks": ["a"]}', "p.jsonl:3: expected the fields"),
        ('{"chunks": ["a", 1], "question": "b"}', "p.jsonl:3: chunks: expected a list of texts"),
        ('{"chunks": ["a"], "question": ""}', "p.jsonl:3: question: expected a text"),
        ('{"messages": []}', "p.jsonl:3: messages: expected a list"),
        ('{"messages": [{"role": "user", "content": 3}]}', "p.jsonl:3: messages.0.content"),
        ('{"messages": [{"role": "user", "content": "one text"}]}', "p.jsonl:3: messages: expected two texts"),
    ],
)
def test_bad_prompts_are_refused_by_line_and_field(tmp_path: Path, line: str, says: str) -> None:
    assert says in refused(tmp_path, line)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, says in (("empty", "no prompt"), ("absent", "No such file")):
        with pytest.raises(SettingsError, match=says):
            read(tmp_path / name, 10)


def test_a_model_writes_its_own_prompts_the_same_each_time(tiny: Checkpoint) -> None:
    ours = written(tiny, 3, 400)
    assert ours == written(tiny, 3, 400)
    for example in ours:
        assert 4 <= len(example.parts) - 1 <= 6
        assert example.parts[-1][5:10] in "".join(example.parts[:-1])
    with pytest.raises(SettingsError, match="too short"):
        written(tiny, 3, 100)


def test_a_continuation_is_what_all_of_it_computed_says(tiny: Checkpoint) -> None:
    trial, ids = Trial(tiny, 64), list(range(30))
    answer = trial.continued(ids, 6, lambda scores: int(scores.argmax()))
    for count in range(6):
        assert int(trial.compute([*ids, *answer[:count]], 1).argmax()) == answer[count]


def test_the_quickest_within_the_limits_is_chosen() -> None:
    assert chosen({NONE: found(0.01, 0.95, 0.2), MORE: found(0.001, 0.99, 0.3, 0.3)}, LIMITS) == NONE
    assert chosen({NONE: found(0.03, 0.95, 0.2), MORE: found(0.001, 0.99, 0.3, 0.3)}, LIMITS) == MORE
    assert chosen({NONE: found(0.01, 0.85, 0.2), MORE: found(0.001, 0.99, 0.95, 0.3)}, LIMITS) is None
    # What computes as little is as quick, whatever the clock says.
    assert chosen({NONE: found(0.01, 0.95, 0.2), MORE: found(0.001, 0.99, 0.3)}, LIMITS) == MORE
    uncertain = replace(found(0.01, 0.95, 0.2), kl=[0.0, 0.0, 0.05])
    assert chosen({NONE: uncertain}, LIMITS) is None
    assert nearest({NONE: found(0.03, 0.95, 0.2), MORE: found(0.9, 0.99, 0.3)}, LIMITS) == NONE


def test_everything_is_measured_and_more_is_closer(tiny: Checkpoint) -> None:
    examples = [question_about([f"{n} and {n * 7}, " * 9, f"{n * 3} or {n}; " * 9], "what?") for n in (11, 23, 57)]
    samples = [sample for example in examples if (sample := sample_of(example, tiny.tokenizer, 64)) is not None]
    assert len(samples) == 3
    few = [NONE, MORE, Candidate("full", 1.0, "alone"), Candidate("none", 0.0, "alone")]
    few += [Candidate("kvshare", 0.1, "alone", repair) for repair in (0, 4, 7)]
    few += [Candidate("none", 0.0, "seen"), Candidate("cachecraft", 0.25, "seen"), Candidate("cachecraft", 0.5, "seen")]
    *_, table = Calibration(tiny, samples, "raw").run(few)
    losses = {one: findings.loss for one, findings in table.items()}
    assert losses[few[2]].kl < 1e-6
    assert losses[few[2]].agreement == 1.0
    assert losses[MORE].kl < losses[NONE].kl
    assert losses[few[6]].kl < losses[few[5]].kl < losses[few[4]].kl
    assert table[few[4]].operations < table[few[5]].operations < table[few[6]].operations
    assert losses[few[9]].kl < losses[few[8]].kl < losses[few[7]].kl
    assert table[few[7]].operations < table[few[8]].operations < table[few[9]].operations
    assert all(len(findings.kl) == 3 for findings in table.values())
    assert table_of(table, MORE).count("<") == 1
    assert {one.stored for one in grid()} == {"mean", "head", "seen", "alone"}
    assert {one.selector for one in grid() if one.repair} == {"kvshare"}
    assert {one.stored for one in grid() if one.selector == "cachecraft"} == {"seen"}


def test_the_command_line_writes_a_point_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "tiny", max_position_embeddings=1024)
    lines = [{"chunks": [f"{n} and {n * 7}, " * 9, f"{n} or " * 12], "question": "what?"} for n in (11, 23)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = str(tmp_path / "tiny")
    given = [
        "calibrate",
        "--model",
        model,
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--dtype",
        "float32",
        "--threads",
        "1",
    ]
    assert main([*given, "--loss", "kl=1e-12"]) == 1
    told = capsys.readouterr()
    assert "prompt 2 of 2" in told.err
    assert "nearest came" in told.err
    assert not (tmp_path / "tiny" / FILE).exists()
    assert main([*given, "--loss", "kl=100,agreement=0.01"]) == 0
    assert "wrote" in capsys.readouterr().out
    point = load(tmp_path / "tiny" / FILE)
    point.check_model(load_checkpoint(Path(model), name="tiny").fingerprint, torch.float32, "here")
    assert (point.most_loss, point.least_agreement) == (100.0, 0.01)


def test_what_the_template_refuses_or_does_not_fit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "tiny", max_position_embeddings=512)
    settings = json.loads((tmp_path / "tiny" / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% if 'no' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}" + (settings["chat_template"])
    )
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = [{"chunks": [text], "question": "what?"} for text in ("some " * 20, "text " * 200, "no " * 30)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["calibrate", "--model", str(tmp_path / "tiny"), "--prompts", str(tmp_path / "p.jsonl"), "--threads", "1"]
    assert main(given) == 2
    assert "--prompts: prompt 3: " in capsys.readouterr().err
    assert main([*given, "--prompts-limit", "2"]) == 2
    assert "1 of 2 prompts have" in capsys.readouterr().err


def test_wrong_command_lines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", str(tmp_path / "absent")]) == 2
    assert main(["calibrate", "--model", "bundled", "--out", str(tmp_path / "no" / "where")]) == 2
    assert "no such directory" in capsys.readouterr().err
    for loss in ("kl", "kl=0", "agreement=1.5", "speed=3"):
        with pytest.raises(SystemExit) as stop:
            parse_calibration(["--model", "x", "--loss", loss])
        assert stop.value.code == 2
    assert parse_calibration(["--model", "x", "--loss", "agreement=1"]).most_kl == 0.02


def test_the_codecs_of_the_command_line_are_those_there_are() -> None:
    from cachestore.kv.codecs import CODECS

    for name in CODECS:
        assert parse_calibration(["--model", "x", "--codec", name]).codec == name
