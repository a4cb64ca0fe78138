"""What reusing chunks costs: `python -m loadtest.quality.chunks --out DIR [--model DIR]`.

For every task and prompt: full prefill, and every method on the same stored chunks. Reported is KL(full ‖ method) over
the ending, relative to using chunks as they are, beside measured time, operations and the share of tokens computed.
What is measured of a prompt is written down at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoint import BUNDLED, load_checkpoint
from engine.settings import usable_cores
from loadtest.data import DataError, data_dir
from loadtest.quality.measuring import FOREIGN, Bench, Cost, costs
from loadtest.quality.methods import Case, Method, methods
from loadtest.quality.report import Row, checks, checks_table, save, table
from loadtest.quality.statistics import relative
from loadtest.quality.tasks import Prompt, Tasks
from loadtest.training.samples import held_out

TASKS = ("quote", "facts", "continuation")
_CAPACITY = 4096
_ELSEWHERE = 10_000
"""Prompts from this number on lend their chunks as foreign texts."""
Divergences = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""By task and the method's label, one number a prompt."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how."""

    model: Path = BUNDLED
    prompts: int = 200
    """Of each task."""
    rounds: int = 9
    """Measurements of each time, of which the fastest counts."""
    workers: int = field(default_factory=usable_cores)
    """Processes that measure divergences, and threads that times are measured with."""
    seed: int = 1


class Worker:
    """What a process needs to measure divergences."""

    def __init__(self, plan: Plan, text: str) -> None:
        checkpoint = load_checkpoint(plan.model, name="quality", dtype="float32")
        head = tuple(checkpoint.tokenizer.encode_rendered("<|begin|><|user|>")[0])
        self.bench = Bench(checkpoint, _CAPACITY)
        self.tasks = Tasks(text, checkpoint.tokenizer, head, plan.seed)
        self._methods = methods()

    def case(self, prompt: Prompt, task: str, index: int) -> Case:
        """A prompt made ready."""
        rng = np.random.default_rng((7, index))
        foreign = self.tasks.prompt(task, _ELSEWHERE + index).chunks[:FOREIGN]
        return self.bench.case(prompt, foreign, rng)

    def divergences(self, task: str, index: int) -> dict[str, float]:
        """Of every method that the task has on one prompt."""
        case = self.case(self.tasks.prompt(task, index), task, index)
        chosen = (method for method in self._methods if method.measured_on(task))
        return {method.label: self.bench.divergence(case, method) for method in chosen}

    def costs(self, prompt: Prompt, rounds: int) -> dict[Method, Cost]:
        """Of every method on one prompt."""
        return costs(self.bench, self.case(prompt, "quote", 0), self._methods, rounds)


_worker: Worker
"""Of this process, where it is one of several."""


def _begin(plan: Plan, text: str) -> None:
    global _worker  # there is no other way to keep anything in a process of a pool
    torch.set_num_threads(1)
    _worker = Worker(plan, text)


def _measure(task: str, index: int) -> dict[str, Any]:
    return {"task": task, "index": index, "kl": _worker.divergences(task, index)}


class Notes:
    """The file of what was measured of each prompt; its first line says of what."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Takes up what is there of the same model, seed and methods; anything else is begun anew."""
        lines = _lines(path)
        fits = bool(lines) and lines[0] == facts
        self.rows: list[dict[str, Any]] = lines[1:] if fits else []
        self._path = path
        with path.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in (facts, *self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Write down what was measured of a prompt."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def missing(self, count: int) -> Iterator[tuple[str, int]]:
        """Tasks and numbers of prompts that are left to measure."""
        known = {(row["task"], row["index"]) for row in self.rows}
        return ((task, index) for task in TASKS for index in range(count) if (task, index) not in known)

    def divergences(self, count: int) -> Divergences:
        """All of them, in the order of prompts."""
        rows = sorted((row for row in self.rows if row["index"] < count), key=lambda row: row["index"])
        labels = {task: [method.label for method in methods() if method.measured_on(task)] for task in TASKS}
        return {
            task: {label: np.array([row["kl"][label] for row in rows if row["task"] == task]) for label in labels[task]}
            for task in TASKS
        }


def _lines(path: Path) -> list[dict[str, Any]]:
    """What can be read of it: the last line may be cut."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def run(plan: Plan, out: Path) -> list[Row]:
    """Measure what is not measured yet, and write it all to `out`. Raises DataError without the texts."""
    text = held_out(data_dir())
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(plan.workers)
    worker = Worker(plan, text)
    labels = [method.label for method in methods()]
    facts = {"model": worker.bench.checkpoint.fingerprint, "seed": plan.seed, "methods": labels}
    notes = Notes(out / "divergences.jsonl", facts)
    _measure_all(plan, text, notes)
    short = worker.costs(worker.tasks.prompt("quote", 0), plan.rounds)
    long = worker.costs(worker.tasks.long(6, 512), plan.rounds)
    rows = _rows(notes.divergences(plan.prompts), short, long)
    save(rows, {**facts, "prompts": plan.prompts, "threads": plan.workers}, out)
    return rows


def _measure_all(plan: Plan, text: str, notes: Notes) -> None:
    left, began = list(notes.missing(plan.prompts)), time.monotonic()
    if not left:
        return
    # Forked processes would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.workers, mp_context=context, initializer=_begin, initargs=(plan, text)) as pool:
        for done, future in enumerate(as_completed([pool.submit(_measure, *one) for one in left]), 1):
            notes.add(future.result())
            if done % 20 == 0 or done == len(left):
                print(f"{done} of {len(left)} prompts, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _rows(found: Divergences, short: Mapping[Method, Cost], long: Mapping[Method, Cost]) -> list[Row]:
    chosen = list(short)
    base = chosen[0].label
    return [
        Row(
            name=method.name,
            stored=method.stored,
            ratio=method.ratio,
            turned=method.turned,
            quality={
                task: relative(found[task][method.label], found[task][base])
                for task in TASKS
                if method.measured_on(task)
            },
            **asdict(short[method]),
            seconds_long=long[method].seconds,
        )
        for method in chosen
    ]


def draw(rows: list[Row], folder: Path) -> None:
    """A picture of every task."""
    from loadtest import plots  # so that the processes that measure do without

    for task in TASKS:
        plots.chunks(folder / f"chunks-{task}.png", rows, task)


def main() -> int:
    """Measure everything, write it down, and say whether it is as it should be; 1 without the data."""
    usual = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, figures and plots")
    parser.add_argument("--model", type=Path, default=usual.model, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=usual.prompts, help="per task")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="measurements of time; the fastest counts")
    parser.add_argument("--workers", type=int, default=usual.workers, help="processes; threads where time is measured")
    parser.add_argument("--seed", type=int, default=usual.seed)
    args = vars(parser.parse_args())
    out = args.pop("out")
    try:
        rows = run(Plan(**args), out)
    except DataError as error:
        print(f"chunks: {error}", file=sys.stderr)
        return 1
    draw(rows, out)
    print(table(rows))
    print(checks_table(checks(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
