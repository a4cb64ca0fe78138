"""What measures chunk reuse: tasks that need their chunks, relative divergences, every method once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.tokenizer import load_tokenizer
from loadtest.quality.chunks import Notes, Plan, Worker
from loadtest.quality.measuring import costs
from loadtest.quality.methods import methods
from loadtest.quality.report import Row, checks, checks_table, save, table
from loadtest.quality.statistics import Relative, divergence, relative
from loadtest.quality.tasks import CHUNK, SUFFIX, Tasks
from tests.engine.checkpoints import write, write_tokenizer

TEXT = 40 * " ".join(f"Alice met Robert at the {word}; Walter said nothing." for word in ("gate", "well", "mill"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    write_tokenizer(tmp_path)
    return Tasks(TEXT, load_tokenizer(tmp_path), (7, 8), seed=3)


def test_endings_need_what_stands_in_the_chunks(tasks: Tasks, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    for prompt in (tasks.prompt("quote", index) for index in range(5)):
        assert any(prompt.suffix == chunk[at : at + SUFFIX] for chunk in prompt.chunks for at in range(CHUNK))
    for prompt in (tasks.prompt("facts", index) for index in range(5)):
        stated = "".join(tokenizer.decode(chunk) for chunk in prompt.chunks)
        name = tokenizer.decode(prompt.suffix).removeprefix("What is ").split("?")[0]
        assert f"{name}: " in stated
    for task in ("quote", "facts", "continuation"):
        for prompt in (tasks.prompt(task, index) for index in range(5)):
            assert 4 <= len(prompt.chunks) <= 6
            assert len(prompt.suffix) == SUFFIX
            assert len(prompt.tokens) == 2 + sum(map(len, prompt.chunks)) + SUFFIX
    assert list(map(len, tasks.long(3, 50).chunks)) == [50] * 3
    assert tasks.prompt("quote", 3) == tasks.prompt("quote", 3) != tasks.prompt("quote", 4)
    with pytest.raises(KeyError):
        tasks.prompt("poetry", 1)


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
    worker = Worker(Plan(tmp_path, seed=1), TEXT)
    found, chosen = worker.divergences("quote", 0), methods()
    assert [method.label for method in chosen] == list(found)
    for method in chosen:
        assert (found[method.label] < 1e-6) == (method.name == "full")
    ends = [method for method in chosen if method.ratio in (0.0, 1.0) and method.stored == "alone" and method.turned]
    prompt = worker.tasks.prompt("quote", 1)
    none, full = costs(worker.bench, worker.case(prompt, "quote", 1), ends, 1).values()
    assert full.computed == full.operations == 1.0
    assert none.computed < none.operations < 0.2  # what is left to compute stands at the end


def test_measuring_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    facts = {"model": "one", "seed": 1}
    notes = Notes(tmp_path / "notes", facts)
    assert len(list(notes.missing(2))) == 6
    kl = {method.label: 0.5 for method in methods()}
    for index in (1, 0):
        notes.add({"task": "facts", "index": index, "kl": {**kl, "none|alone|0.00|turned": float(index)}})
    with (tmp_path / "notes").open("a") as file:
        file.write('{"task": "quote", "ind')
    again = Notes(tmp_path / "notes", facts)
    assert list(again.missing(2)) == [("quote", 0), ("quote", 1), ("continuation", 0), ("continuation", 1)]
    assert again.divergences(2)["facts"]["none|alone|0.00|turned"].tolist() == [0.0, 1.0]
    assert len(list(Notes(tmp_path / "notes", {**facts, "seed": 2}).missing(2))) == 6


def test_keys_left_unturned_are_measured_on_one_task(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes", {})
    for task in ("quote", "facts", "continuation"):
        notes.add({"task": task, "index": 0, "kl": {m.label: 0.5 for m in methods() if m.measured_on(task)}})
    found = notes.divergences(1)
    assert len(found["quote"]) == len(methods()) > len(found["facts"]) == len(found["continuation"])
    assert "none|alone|0.00|not turned" in found["facts"]


def row(name: str, ratio: float, quality: float, **changes: object) -> Row:
    found = Relative(quality, quality, quality)
    given = {"stored": "alone", "turned": True, "quality": {"quote": found, "facts": found}, **changes}
    return Row(name=name, ratio=ratio, computed=0.1, operations=0.1, **{"seconds": 0.2, "seconds_long": 0.1, **given})  # type: ignore[arg-type]


ROWS = [
    row("none", 0.0, 1.0),
    row("none", 0.0, 4.0, turned=False),
    replace(row("epic", 0.15, 3.0, turned=False), quality={"quote": Relative(3.0, 2.9, 3.1)}),
    row("full", 1.0, 1e-9),
    row("random", 0.15, 0.9),
    row("epic", 0.05, 0.3),
    row("epic", 0.15, 0.2),
    row("cacheblend K+V", 0.15, 0.3),
    row("sensitive", 0.15, 0.1, stored="mean"),
    row("sensitive", 0.30, 0.01, stored="mean", seconds=0.5),
]


def test_what_must_hold_is_told() -> None:
    found = checks(ROWS)
    assert [check.claim for check in found if not check.holds] == []
    assert "0.100 (sensitive 0.15, mean, at 0.20 of the time)" in checks_table(found)
    worse = [*ROWS[:5], row("epic", 0.05, 0.1), *ROWS[6:8], row("sensitive", 0.15, 0.5, stored="mean")]
    claims = " ".join(check.claim for check in checks(worse) if not check.holds)
    assert claims.count("falls with the ratio: epic") == claims.count("ours on quote") == 1
    assert "**no**" in checks_table(checks(worse))


def test_all_is_written_down(tmp_path: Path) -> None:
    save(ROWS, {"seed": 1}, tmp_path)
    assert (tmp_path / "chunks.md").read_text().startswith(table(ROWS))
    assert table(ROWS).splitlines()[2].startswith("| none | alone | yes | 0.00 | 1.000 (1.000–1.000) |")
    pytest.importorskip("matplotlib")
    from loadtest import plots

    plots.chunks(tmp_path / "quote.png", ROWS, "quote")
    assert (tmp_path / "quote.png").read_bytes().startswith(b"\x89PNG")
