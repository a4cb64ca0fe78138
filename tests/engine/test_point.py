"""The file that says how chunks are reused: what it may hold, and whose it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from engine.checkpoint import BUNDLED, load_checkpoint
from engine.reuse.chunks import BlendPrompt
from engine.reuse.point import FILE, Loss, OperatingPoint, PointError, SelectorName, beside, load
from engine.reuse.selectors import Epic

POINT = OperatingPoint(
    model="abc",
    dtype="float32",
    selector="epic",
    ratio=0.15,
    stored="head",
    codec="entropy",
    loss=Loss(kl=0.001, agreement=0.99, relative_time=0.3),
    most_loss=0.01,
)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    craft = replace(POINT, selector="cachecraft", stored="seen", versions=5)
    for point in (POINT, replace(POINT, check_share=0.5, least=32, repair=2), craft):
        point.save(tmp_path / FILE)
        assert load(tmp_path / FILE) == point
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_is_usual_may_be_left_out(tmp_path: Path) -> None:
    POINT.save(tmp_path / FILE)
    raw = json.loads((tmp_path / FILE).read_text())
    for key in ("check_share", "least", "versions", "repair"):
        del raw[key]
    (tmp_path / FILE).write_text(json.dumps(raw))
    assert load(tmp_path / FILE) == POINT


@pytest.mark.parametrize("name", get_args(SelectorName))
def test_every_selector_can_be_made(name: SelectorName) -> None:
    made = replace(POINT, selector=name).made(0.3)
    assert made.choose(BlendPrompt([1, 2, 3], ())).shape == (3,)


def test_the_ratio_is_never_below_the_points() -> None:
    assert [POINT.made(ratio) for ratio in (None, 0.1, 0.4)] == [Epic(0.15), Epic(0.15), Epic(0.4)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version: 2 is not 1"),
        ("model", "", "model: expected text"),
        ("dtype", "int8", "dtype: expected one of float32"),
        ("selector", "best", "selector: expected one of full, none"),
        ("ratio", 1.5, "ratio: expected a number from 0 on and up to 1, got 1.5"),
        ("ratio", True, "ratio: expected a number"),
        ("ratio", float("nan"), "ratio: expected a number"),
        ("stored", "here", "stored: expected one of mean, head, alone, seen"),
        ("codec", "zip", "codec: expected one of raw"),
        ("loss", 3, "loss: expected an object"),
        ("loss", {"kl": 0.1}, "loss.agreement: missing"),
        ("loss", {"kl": -1, "agreement": 1, "relative_time": 1}, "loss.kl: expected a number from 0 on"),
        ("most_loss", None, "most_loss: expected a number"),
        ("most_loss", 0, "most_loss: expected a number above 0, got 0"),
        ("least_agreement", 1.1, "least_agreement: expected a number above 0 and up to 1"),
        ("least", 0, "least: expected a whole number of at least 1"),
        ("selector", "cachecraft", "stored: expected seen, as the selector cachecraft needs it, got 'head'"),
        ("versions", 0, "versions: expected a whole number of at least 1 and at most 16, got 0"),
        ("versions", 17, "versions: expected a whole number of at least 1 and at most 16, got 17"),
        ("repair", 1.0, "repair: expected a whole number"),
        ("repair", 8, "repair: expected a whole number of at least 0 and at most 7, got 8"),
        ("speed", 1, "speed: no such key"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / FILE
    POINT.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(PointError, match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / FILE
    for text, message in ((None, "No such file"), ("{", "Expecting"), ("[]", "expected a JSON object")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(PointError, match=message):
            load(path)


def test_another_models_point_is_refused_by_name() -> None:
    POINT.check_model("abc", torch.float32, "p.json")
    with pytest.raises(PointError, match=r"p.json: model: measured for abc, this one is xyz"):
        POINT.check_model("xyz", torch.float32, "p.json")
    with pytest.raises(PointError, match=r"dtype: measured in float32, this engine computes in bfloat16"):
        POINT.check_model("abc", torch.bfloat16, "p.json")


def test_each_dtype_may_have_a_point_beside_a_model(tmp_path: Path) -> None:
    plain, own = tmp_path / FILE, tmp_path / "reuse-bfloat16.json"
    assert beside(tmp_path, torch.bfloat16) == plain
    POINT.save(plain)  # of float32
    assert beside(tmp_path, torch.float32) == plain
    assert beside(tmp_path, torch.bfloat16) == own
    own.write_text("{}")
    assert beside(tmp_path, torch.bfloat16) == own
    assert beside(tmp_path, torch.float32) == plain
    plain.write_text("no JSON")
    assert beside(tmp_path, torch.float32) == plain


def test_the_bundled_model_has_a_point_for_every_dtype_that_a_cpu_computes_in() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint = load_checkpoint(BUNDLED, name="bundled", dtype=str(dtype).removeprefix("torch."))
        path = beside(BUNDLED, dtype)
        load(path).check_model(checkpoint.fingerprint, checkpoint.dtype, str(path))
