"""The engine's bench, on a model so small that only its workings show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.checkpoint import load_checkpoint
from loadtest.bench_client import BenchError
from loadtest.engine.bench import main
from loadtest.engine.local import Local, Steps
from loadtest.engine.shapes import SHAPES, write_shape


def test_it_measures_everything_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "tiny", "--dtype", "float32", "--threads", "1", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quick"]
    compared = {(figure["name"], figure["ceiling_name"]): figure for figure in found["figures"]}
    assert list(compared) == [
        ("tiny float32: 4 at once", "one after another"),
        ("tiny float32: 4 at once over HTTP", "one after another"),
        ("tiny float32: 4 at once", "transformers' continuous batching"),
        ("tiny float32: one stream", "transformers' generate"),
        ("tiny float32: first token, 128 tokens, 90 % known", "nothing known"),
        ("tiny float32: step of 1", ""),
        ("tiny float32: step of 1, outside the model", ""),
        ("tiny float32: step of 4", ""),
        ("tiny float32: step of 4, outside the model", ""),
    ]
    assert all(figure["measured"] > 0 for figure in found["figures"])
    bars = [figure["bar"] for figure in found["figures"]]
    assert bars == [">= 4 x", ">= 4 x", ">= 1.50 x", ">= 1 x", "<= 0.150 x", None, None, None, None]


def test_a_checkpoint_that_cannot_be_loaded_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "nothing")]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_a_step_that_never_was_has_no_time() -> None:
    with pytest.raises(BenchError, match="no step served 16"):
        Steps(whole={1: [0.1]}, model={1: [0.1]}).of(16)


def test_what_is_known_is_told_apart(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_shape("tiny", tmp_path), name="tiny")
    prompt = list(range(3, 103))
    with Local(checkpoint, tokens=512, threads=1).running() as engine:
        cold, known = (engine.together([prompt], 3)[0] for _ in range(2))
    assert (cold.cached, known.cached) == (0, 96)
    assert 0 < known.first < known.last
    assert known.tokens == 3


def test_the_realistic_shapes_differ_in_depth_and_vocabulary_only() -> None:
    small, whole = SHAPES["small"], SHAPES["qwen2.5-0.5b"]
    different = {name for name in small if small[name] != whole[name]}
    assert different == {"num_hidden_layers", "vocab_size"}
