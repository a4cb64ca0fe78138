"""The measurement for GPUs works without one, on a tiny shape: every figure is there, and a failure takes no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.config import parse_config
from loadtest.engine import gpu


def test_every_figure_of_the_engine(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "machine,serve-tiny"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        "copy within memory, read and written",
        "matrix product of 256 in torch.float32",
        "tiny: decoding, batch 1",
        "tiny: prompt of 320",
        "tiny: 4 concurrent",
        "tiny: first token of 320, 90 % known",
    ]
    assert all(row["measured"] > 0 for row in found["rows"])
    assert not any("failed" in note["note"] for note in found["notes"])
    assert "| tiny: decoding, batch 1" in (tmp_path / "results.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing fails")
def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cuda", "--tiny", "--out", str(tmp_path), "--parts", "machine"]) == 1
    notes = [note["note"] for note in json.loads((tmp_path / "results.json").read_text())["notes"]]
    assert any("Traceback" in note.get("error", "") for note in notes)
    assert notes[-1] == {"failed": "machine", "error": "exit status 1"}


def test_what_is_beside_transformers() -> None:
    notes = [{"part": "a", "note": {"concurrent": "m", "ours": 300.0}}]
    assert gpu.summary(notes)[0] == []
    rows, _ = gpu.summary([*notes, {"part": "b", "note": {"concurrent": "m", "theirs": 100.0}}])
    assert [(row.judged, row.holds) for row in rows] == [(3.0, True)]


def test_the_floors_of_llama(tmp_path: Path) -> None:
    config = parse_config(gpu.SHAPES[gpu.LLAMA])
    # 6.98 billion weights in the layers, each a multiplication and an addition a token, and half a square of scores.
    assert gpu.prefill_operations(config, 8192) == pytest.approx(2 * 6.979e9 * 8192 + 8.8e12 * 2, rel=0.01)
    meta = gpu.Setting(torch.device("meta"), torch.bfloat16, gpu.Sizes(), tmp_path, {}, tiny=False)
    checkpoint = gpu.random_checkpoint(gpu.LLAMA, meta)
    assert gpu.weight_bytes(checkpoint) == pytest.approx(2 * (8.03e9 - 128_256 * 4096), rel=0.01)
    tied = gpu.random_checkpoint(gpu.QWEN, meta)
    assert gpu.weight_bytes(tied) == pytest.approx(2 * 1.544e9, rel=0.01)
