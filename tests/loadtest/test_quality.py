"""What measures chunk reuse: tasks that need their chunks, relative divergences, every method once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.tokenizer import load_tokenizer
from loadtest.quality import chunks
from loadtest.quality.report import Row, save, table
from loadtest.quality.statistics import Relative, divergence, relative
from loadtest.quality.tasks import CHUNK, SUFFIX, Tasks
from tests.engine.checkpoints import write, write_tokenizer

TEXT = 40 * " ".join(f"Alice met Robert at the {word}; Walter said nothing." for word in ("gate", "well", "mill"))


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    write_tokenizer(tmp_path)
    return Tasks(TEXT, load_tokenizer(tmp_path), (7, 8), seed=3)


def test_endings_need_what_stands_in_the_chunks(tasks: Tasks, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    for prompt in tasks.prompts("quote", 5):
        assert any(prompt.suffix == chunk[at : at + SUFFIX] for chunk in prompt.chunks for at in range(CHUNK))
    for prompt in tasks.prompts("facts", 5):
        stated = "".join(tokenizer.decode(chunk) for chunk in prompt.chunks)
        name = tokenizer.decode(prompt.suffix).removeprefix("What is ").split("?")[0]
        assert f"{name}: " in stated
    for task in ("quote", "facts", "continuation"):
        for prompt in tasks.prompts(task, 5):
            assert 4 <= len(prompt.chunks) <= 6
            assert len(prompt.suffix) == SUFFIX
            assert len(prompt.tokens) == 2 + sum(map(len, prompt.chunks)) + SUFFIX
    assert list(map(len, tasks.long(3, 50).chunks)) == [50] * 3
    with pytest.raises(KeyError):
        tasks.prompts("poetry", 1)


def test_divergence_is_zero_only_for_the_same() -> None:
    scores = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert divergence(scores, scores) == divergence(scores, scores + 3) < 1e-8
    assert divergence(scores, scores.roll(1, 1)) > 0.1


def test_ratios_are_compared_prompt_by_prompt() -> None:
    base = np.exp(np.random.default_rng(0).normal(0, 5, 300))
    noise = np.random.default_rng(1).normal(np.log(0.2), 0.5, 300)
    found = relative(base * np.exp(noise), base)
    assert found.value == pytest.approx(np.exp(noise.mean()))
    assert found.low < found.value < found.high < 1.2 * found.low  # the prompts' own differences cancel
    assert relative(base, base).value == 1.0


def test_every_method_runs_and_all_of_it_is_exact(tmp_path: Path) -> None:
    write(tmp_path, max_position_embeddings=2048)
    checkpoint = load_checkpoint(tmp_path, name="tiny", dtype="float32")
    ours, others = (Tasks(TEXT, checkpoint.tokenizer, (7, 8), seed) for seed in (1, 2))
    bench, chosen = chunks.Bench(checkpoint, 1024), chunks.methods()
    divergences = chunks.measure(bench, ours, others, "quote", 1, chosen)
    ends = [method for method in chosen if method.name in ("none", "full", "epic") and method.stored == "alone"]
    spent = chunks.costs(bench, next(ours.prompts("quote", 1)), ends, 1)
    for method in chosen:
        assert (divergences[method][0] < 1e-6) == (method.name == "full")
    rows = []
    for method in ends:
        quality = {"quote": relative(divergences[method], divergences[chosen[0]])}
        rows.append(Row(method.name, method.stored, method.ratio, quality, *spent[method], spent[method][2]))
    full, none = (next(row for row in rows if row.name == name) for name in ("full", "none"))
    assert full.computed == full.operations == 1.0
    assert none.computed < none.operations < 0.2  # what is left to compute stands at the end
    save(rows, {"seed": 1}, tmp_path)
    assert (tmp_path / "chunks.md").read_text() == table(rows)
    assert (tmp_path / "chunks-quote.svg").read_text().count("<polyline") == 2


def test_the_table_has_a_line_for_every_method() -> None:
    row = Row("none", "alone", 0.0, {"quote": Relative(1.0, 1.0, 1.0)}, 0.1, 0.1, 0.2, 0.1)
    assert table([row]).splitlines()[2].startswith("| none | alone | 0.00 | 1.000 (1.000–1.000) | 0.10 |")
