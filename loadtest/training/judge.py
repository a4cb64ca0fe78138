"""Train the pair model: `python -m loadtest.training.judge [--out DIR] [--cache DIR] [--steps N]`.

Writes the int8 graph, the head and the model card beside `gateway/judge/load.py`. It takes two cores for not quite an
hour: two runs at a time, of one thread each, since two threads that wait for each other took longer. Run it with
`MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000`, or a third of the time goes into giving memory
back. `--keep FILE` lets a run that was stopped go on.

1. Every pair set of the measurement data is split by group; the held-out part is never trained on.
2. `judge_net.PairNet` starts from the embedder's weights and sees each epoch another mix of real and edited pairs
   (`judge_data`). The rate rises, stays, and falls to nothing in the last part; what is kept is the mean over the last
   few hundred steps. Six such runs differ only in the order and the mix of pairs, and their weights are averaged. From
   there four short ones go on, with more of the sets whose like pairs are hardest to tell; a third of what ships is
   their mean, two thirds the first.
3. The net is written as an int8 graph (`judge_export`), and from here on only that graph is asked.
4. The head is fitted to its logits on the held-out part; the card's figures are of heads fitted to four fifths of it
   and asked about the fifth. Where guards have changed since, `--calibrate` does this alone, in two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from engine.settings import usable_cores
from gateway.embedding.local import find_model, load
from gateway.judge.load import FOLDER, GRAPH, HEAD
from gateway.judge.model import PairModel
from gateway.judge.pairs import Row, row
from loadtest.data import data_dir
from loadtest.training import judge_calibrate as calibrate
from loadtest.training import judge_export as export
from loadtest.training.autocast import autocast
from loadtest.training.judge_data import NOISY, SHARES, Sample, derived, epoch, read_sets, split
from loadtest.training.judge_net import PairNet
from loadtest.training.judge_text import Tokens

SEED = 1
FALL = 0.45
"""Last part of a run, in which the rate falls."""
BATCH_TOKENS = 1280
SMOOTHING = 0.05
DECAY = 0.01
RANGE_PAIRS = 400
KEEP = 300
"""Steps after which a run can go on."""


@dataclass(frozen=True, slots=True)
class Round:
    """Runs that begin alike, in orders of their own, and whose weights are averaged.

    ("Model soups", Wortsman et al., arXiv 2203.05482.) One net to ask, and less of what chance does to each.
    """

    seeds: tuple[int, ...]
    steps: int
    rate: float
    warm_up: int
    """Steps in which the rate rises."""
    average: float
    """Of the running mean of the weights."""
    shares: Mapping[str, float]
    """How often a row of a set is seen in an epoch."""


FIRST = Round((1, 2, 3, 4, 5, 6), 2200, 1e-4, 150, 0.998, SHARES)
"""About an epoch and a quarter each."""
SECOND = Round(
    (11, 12, 13, 14), 900, 3e-5, 50, 0.99, {**SHARES, "covidq_pairs": 3, "gsmplus": 2, "mqp_medical": 4, "qqp": 3}
)
"""Not quite a quarter of an epoch of its own."""

Mix = tuple[Sequence[Sample], Sequence[Sample]]
"""Pairs to learn from, and those that follow from them."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Weights = Mapping[str, Tensor]
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Indices of pairs, and the length they are padded to."""

    tokens: int
    pairs: list[int]


def batches(lengths: Sequence[int], chance: random.Random) -> list[Batch]:
    """Group pairs of like length, about BATCH_TOKENS each, in random order.

    Padded lengths are few: the kernels are made anew for every shape.
    """
    by_length: dict[int, list[int]] = {}
    for index in chance.sample(range(len(lengths)), len(lengths)):
        by_length.setdefault(_padded(lengths[index]), []).append(index)
    made: list[Batch] = []
    left: list[int] = []
    for tokens in sorted(by_length):
        waiting = left + by_length[tokens]
        size = max(1, BATCH_TOKENS // tokens)
        full = len(waiting) // size * size
        made += [Batch(tokens, waiting[start : start + size]) for start in range(0, full, size)]
        left = waiting[full:]
    if left:
        made.append(Batch(max(by_length), left))
    chance.shuffle(made)
    return made


def _padded(length: int) -> int:
    step = 8 if length <= 96 else 32
    return -(-length // step) * step


def tensors(rows: Sequence[Row], tokens: int) -> Inputs:
    """Token ids, marks, which tokens are the second question's, which are there; all [pairs, tokens]."""
    ids, marks = np.zeros((len(rows), tokens), np.int64), np.zeros((len(rows), tokens), np.int64)
    second, inside = np.zeros((len(rows), tokens), np.bool_), np.zeros((len(rows), tokens), np.bool_)
    for place, item in enumerate(rows):
        length = len(item.ids)
        ids[place, :length], marks[place, :length] = item.ids, item.marks
        second[place, item.second : length], inside[place, :length] = True, True
    return torch.from_numpy(ids), torch.from_numpy(marks), torch.from_numpy(second), torch.from_numpy(inside)


def rate(given: Round, step: int) -> float:
    """The learning rate at a step, from 1 on."""
    return given.rate * min(1.0, step / given.warm_up) * min(1.0, max(0.0, 1 - step / given.steps) / FALL)


def train(
    net: PairNet, learn: Mix, tokens: Tokens, given: Round, seed: int, keep: Path | None = None, every: int = KEEP
) -> tuple[dict[str, Tensor], float]:
    """Train in place; returns the averaged weights and the processor's minutes. Prints how far it is.

    `keep`: a file from which a run that was stopped goes on, if it is there, and that is written every so many steps.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net.train()
    optimiser = _optimiser(net)
    average = {name: value.detach().clone() for name, value in net.state_dict().items()}
    behind, used = 0, -time.process_time()
    if keep is not None and keep.exists():
        known = torch.load(keep)
        net.load_state_dict(known["net"])
        optimiser.load_state_dict(known["optimiser"])
        torch.set_rng_state(known["chance"])
        average, behind = known["average"], known["step"]
        used += known["used"]
    started = time.monotonic()
    plan = _plan(learn, tokens, random.Random(seed), given.shares)
    for step, batch in enumerate(islice(plan, behind, given.steps), behind + 1):
        for group in optimiser.param_groups:
            group["lr"] = rate(given, step)
        inputs, wanted = batch()
        with autocast():
            logits = net(*inputs)
        loss = functional.binary_cross_entropy_with_logits(logits, wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        _blend(average, net, min(given.average, (1 + step) / (10 + step)))
        if step % 200 == 0:
            print(
                f"run {seed}: step {step} of {given.steps}, {time.monotonic() - started:.0f} s, loss {loss.item():.3f}",
                flush=True,
            )
        if keep is not None and step % every == 0:
            state = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": step}
            torch.save(state | {"chance": torch.get_rng_state(), "used": used + time.process_time()}, keep)
    return average, (used + time.process_time()) / 60


def _plan(
    learn: Mix, tokens: Tokens, chance: random.Random, shares: Mapping[str, float]
) -> Iterator[Callable[[], tuple[Inputs, Tensor]]]:
    """What makes the batches, epoch after epoch without end."""
    while True:
        mix = epoch(*learn, chance, shares)
        rows = [row(tokens(sample.a), tokens(sample.b), tokens.start, tokens.end) for sample in mix]
        for batch in batches([len(item.ids) for item in rows], chance):
            yield partial(_filled, mix, rows, batch)


def _filled(mix: Sequence[Sample], rows: Sequence[Row], batch: Batch) -> tuple[Inputs, Tensor]:
    wanted = torch.tensor([mix[index].label for index in batch.pairs]) * (1 - 2 * SMOOTHING) + SMOOTHING
    return tensors([rows[index] for index in batch.pairs], batch.tokens), wanted


def _optimiser(net: PairNet) -> torch.optim.AdamW:
    parameters = list(net.parameters())
    groups = [
        {"params": [item for item in parameters if item.ndim > 1], "weight_decay": DECAY},
        {"params": [item for item in parameters if item.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=FIRST.rate, betas=(0.9, 0.98), fused=True)


def _blend(average: dict[str, Tensor], net: PairNet, keep: float) -> None:
    state = net.state_dict()
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [state[name] for name in average], 1 - keep)


def started(weights: Weights) -> PairNet:
    """What every run begins with."""
    torch.manual_seed(SEED)
    return PairNet.start(weights)


def averaged(runs: Sequence[Weights]) -> dict[str, Tensor]:
    """Of the same tensors of several runs."""
    return {name: torch.stack([run[name].float() for run in runs]).mean(0) for name in runs[0]}


def trained(steps: int, keep: Path | None = None) -> tuple[dict[str, Tensor], float]:
    """Both rounds, the first of so many steps: two parts of its mean to one of the second's, and the processor's
    minutes of all."""
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        first, minutes = _round(pool, replace(FIRST, steps=steps), None, keep)
        second, more = _round(pool, SECOND, first, keep)
    return averaged([first, first, second]), minutes + more


def _round(
    pool: ProcessPoolExecutor, given: Round, begin: Weights | None, keep: Path | None
) -> tuple[dict[str, Tensor], float]:
    """As many runs at a time as there are cores: the mean of all, and the processor's minutes."""
    sent = None if begin is None else {name: value.numpy() for name, value in begin.items()}
    runs = list(pool.map(partial(_run, given, sent, keep), given.seeds))
    return averaged([{k: torch.from_numpy(v) for k, v in run.items()} for run, _ in runs]), sum(m for _, m in runs)


def _run(given: Round, begin: Arrays | None, keep: Path | None, seed: int) -> tuple[Arrays, float]:
    """One run, in a process of its own, from the embedder's weights or those it is given."""
    samples = read_sets(data_dir() / "pairs")
    learn, _ = split(samples)
    source = find_model()
    kept = None if keep is None else keep.with_name(f"{keep.name}.{seed}")
    net, tokens = started(load_file(source / "model.safetensors")), Tokens(source / "tokenizer.json")
    if begin is not None:
        net.load_state_dict({name: torch.from_numpy(value) for name, value in begin.items()})
    average, minutes = train(net, (learn, derived(learn, samples)), tokens, given, seed, kept)
    return {name: value.numpy() for name, value in average.items()}, minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, export, calibrate, write."""
    chosen = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    samples = read_sets(data_dir() / "pairs")
    learn, tested = split(samples)
    source = find_model()
    graph, minutes = _shipped(chosen.out) if chosen.calibrate else _exported(chosen, learn, source)
    model = PairModel(graph, source / "model.safetensors", source / "tokenizer.json", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        embedder, _ = load(chosen.cache or Path(folder), threads=1)
        judged = calibrate.judged([sample for sample in tested if sample.set not in NOISY], model, embedder)
    document, card = calibrate.report(judged, learn, minutes)
    chosen.out.mkdir(parents=True, exist_ok=True)
    calibrate.write(chosen.out, graph, source, document, card)
    print(card)
    print(f"graph: {len(graph) / 2**20:.1f} MiB, {hashlib.sha256(graph).hexdigest()}")
    return 0


def _shipped(folder: Path) -> tuple[bytes, float]:
    """The graph that lies there, and the processor's minutes that it took."""
    return (folder / GRAPH).read_bytes(), float(orjson.loads((folder / HEAD).read_bytes())["minutes"])


def _exported(chosen: argparse.Namespace, learn: Sequence[Sample], source: Path) -> tuple[bytes, float]:
    """A graph of weights trained now, or kept before, and the processor's minutes that they took."""
    tokens, weights = Tokens(source / "tokenizer.json"), load_file(source / "model.safetensors")
    if chosen.weights is None:
        average, minutes = trained(chosen.steps, chosen.keep)
    else:
        known = torch.load(chosen.weights)
        average, minutes = known["weights"], known["minutes"]
    if chosen.save is not None:
        torch.save({"weights": average, "minutes": minutes}, chosen.save)
    state = {name: value.numpy() for name, value in average.items()}
    rows = [
        row(tokens(sample.a), tokens(sample.b), tokens.start, tokens.end)
        for sample in random.Random(SEED).sample(learn, min(RANGE_PAIRS, len(learn)))
    ]
    found = export.ranges(state, rows, started(weights).words.numpy())
    return export.quantised(state, found).SerializeToString(), minutes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.training.judge", description="Train the pair model.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where graph, head and card are written")
    parser.add_argument("--cache", type=Path, help="data directory whose embedder file is used again")
    parser.add_argument("--steps", type=int, default=FIRST.steps, help="of the first round's runs")
    parser.add_argument("--keep", type=Path, help="file to go on from when the run is stopped")
    parser.add_argument("--save", type=Path, help="keep the float weights here")
    parser.add_argument("--weights", type=Path, help="float weights kept before: export and calibrate only")
    parser.add_argument(
        "--calibrate", action="store_true", help="train nothing, only fit the head to the graph in --out"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
