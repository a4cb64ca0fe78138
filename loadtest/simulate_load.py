"""How much traffic a loaded backend is spared, and at which error: a trace of real arrivals through the policies.

python -m loadtest.simulate_load [--trace conv|code] [--pool modelled|SET,SET…|FILE] [--repeat S]... [--json]

Real: arrival times and token counts (Azure 2023). Real unless the pool is `modelled`: which score a judge gives to a
question's nearest neighbour and whether that neighbour's answer serves, drawn from pairs of the measurement data; their
cosine becomes a probability by a curve fitted on one half of the pairs and used on the other. A file of
`{"p": …, "wrong": 0 or 1}` lines takes the scores of any other judge. `modelled` is the mixture of
`loadtest.simulate_budget` with a judge that is honest.

Assumed, because no public trace has both arrivals and texts that repeat: the share of calls that have a neighbour
(`--repeat`), drawn independently; what a token takes; a first-come-first-served pool with so many slots that the trace
without a cache asks for `overload` times as much as it can do, and that answers 429 when as many wait as run. Exact
repeats are left out, and so is the stretched TTL. Checks of hits go to the backend like calls: they are not kept. As in
the gateway the judge is believed at the start, and while the pool is loaded no hit is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gateway.app import open_embedder
from gateway.settings import Settings
from gateway.trusting import trust_rules
from loadtest.data import DataError, data_dir, read_rows
from loadtest.simulate_budget import stream
from policies.budget import BudgetRules, CategoryBudget, Decision
from policies.category import CategoryPolicy, CategoryTable
from policies.load import Load, LoadRules, Signals, relaxed

REPEATS = (0.2, 0.4, 0.6)
_SECONDS_PER_TOKEN = 0.02
_SECONDS_PER_PROMPT_TOKEN = 0.0002
_BINS = 25
_BUSY = 0.5
"""Load from which on no hit is checked, as in the gateway."""
_RECENT = 0.05
"""Weight of the newest call in the recent latency and the recent share of 429."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One call of the trace."""

    at: float
    """Seconds from the first one."""
    service: float
    """Seconds that the backend works on it."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Candidates to draw from: what the judge says, and what is true."""

    p: NDArray[np.float64]
    wrong: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is compared."""

    repeat: float = 0.4
    overload: float = 1.3
    budget: float = 0.05
    wanted: float = 0.97
    """The acceptance point without load."""
    floor: float = 0.5
    max_relax: float = 0.4
    """0 never relaxes."""
    cached: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One run over the trace; shares between 0 and 1, times in seconds."""

    kept: float
    """Calls that did not reach the backend, less the checks sent to it, among all."""
    kept_overloaded: float
    """The same among the calls that would have met a loaded backend without a cache."""
    hits: int
    error: float
    checked: float
    """Checked hits among hits."""
    refused: float
    """Calls answered 429."""
    wait_p95: float
    """Wait in the pool's queue, of the calls it took."""
    engaged: float
    """Share of the calls at which the load was engaged."""
    changes: int
    """How often it was engaged or released."""


def arrivals(rows: Iterator[dict[str, Any]]) -> list[Arrival]:
    """Read an Azure trace."""
    found: list[Arrival] = []
    first: datetime | None = None
    for row in rows:
        at = datetime.fromisoformat(row["timestamp"][:26])
        first = first or at
        work = _SECONDS_PER_TOKEN * row["generated_tokens"] + _SECONDS_PER_PROMPT_TOKEN * row["context_tokens"]
        found.append(Arrival((at - first).total_seconds(), work))
    return found


class _Backend:
    """A pool of slots, first come first served; 429 when as many wait as run."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.latency = 0.0
        self.refused = 0.0
        self._free = [0.0] * slots
        self._under_way: list[tuple[float, float]] = []
        """Finish and latency of what was taken and has not ended."""

    def signals(self, now: float) -> Signals:
        while self._under_way and self._under_way[0][0] <= now:
            _, latency = heapq.heappop(self._under_way)
            self.latency += _RECENT * (latency - self.latency)
        return Signals(len(self._under_way), self.slots, self.latency, self.refused)

    def take(self, call: Arrival) -> float | None:
        """Queue a call; return its wait, None if it was refused."""
        full = len(self._under_way) >= 2 * self.slots
        self.refused += _RECENT * (full - self.refused)
        if full:
            return None
        start = max(call.at, heapq.heappop(self._free))
        heapq.heappush(self._free, start + call.service)
        heapq.heappush(self._under_way, (start + call.service, start + call.service - call.at))
        return start - call.at


def run(calls: Sequence[Arrival], pool: Pool, setup: Setup, loaded: Sequence[bool] | None) -> tuple[Result, list[bool]]:
    """Send a trace through cache and backend; `loaded` marks the calls that count as overloaded (None: this run's own).

    Returns the figures, and at which calls this run's own load was engaged.
    """
    draw = np.random.default_rng(setup.seed)
    picks = draw.integers(0, len(pool.p), len(calls))
    near = draw.random(len(calls)) < (setup.repeat if setup.cached else 0.0)
    draws = draw.random(len(calls))
    gateway = _Gateway(calls, setup)
    for place, call in enumerate(calls):
        pick = int(picks[place])
        found = (float(pool.p[pick]), bool(pool.wrong[pick])) if near[place] else None
        gateway.take(call, found, float(draws[place]))
    return gateway.result(loaded), gateway.engaged


class _Gateway:
    """A cache in front of a backend that is asked for more than it can do, and what became of the calls so far."""

    def __init__(self, calls: Sequence[Arrival], setup: Setup) -> None:
        span = calls[-1].at - calls[0].at
        service = sum(call.service for call in calls)
        self._setup, self._rules = setup, LoadRules(objective=2 * service / len(calls))
        self._backend = _Backend(max(1, round(service / span / setup.overload)))
        self._budget, self._load = CategoryBudget(rules_of(setup), setup.wanted), Load()
        self._kept: list[int] = []
        """By call: 1 where the backend was spared it."""
        self._waits: list[float] = []
        self.engaged: list[bool] = []
        """By call: whether the load was engaged."""
        self._hits = self._wrong = self._checks = self._refusals = 0

    def take(self, call: Arrival, found: tuple[float, bool] | None, draw: float) -> None:
        """Answer a call; `found`: the judge's word for the nearest entry, and whether that is wrong."""
        self._load = self._load.after(call.at, self._backend.signals(call.at), self._rules)
        self.engaged.append(self._load.engaged)
        decision = None if found is None else self._decide(found[0], draw)
        served = decision is not None and decision.serve
        self._hits += served
        self._wrong += served and found is not None and found[1]
        # A check of a hit is a call like others: it may be refused, and then there is no label.
        asked = not served or (decision is not None and decision.check)
        wait = self._backend.take(call) if asked else None
        self._kept.append(served and wait is None)
        if served:
            self._checks += wait is not None
        elif wait is None:
            self._refusals += 1
        else:
            self._waits.append(wait)
        if decision is not None and found is not None and decision.check and wait is not None:
            self._budget.learn(decision, float(found[1]))

    def _decide(self, p: float, draw: float) -> Decision:
        wanted = relaxed(self._setup.wanted, self._setup.floor, self._load.relief, self._setup.max_relax)
        return self._budget.decide(p, draw, wanted, checks=self._load.level < _BUSY)

    def result(self, loaded: Sequence[bool] | None) -> Result:
        """The figures; see `run`."""
        kept, marked = np.array(self._kept, float), np.array(self.engaged if loaded is None else loaded)
        return Result(
            kept=float(kept.mean()),
            kept_overloaded=float(kept[marked].mean()) if marked.any() else 0.0,
            hits=self._hits,
            error=self._wrong / max(1, self._hits),
            checked=self._checks / max(1, self._hits),
            refused=self._refusals / len(kept),
            wait_p95=float(np.quantile(self._waits, 0.95)) if self._waits else 0.0,
            engaged=float(np.mean(self.engaged)),
            changes=sum(one != two for one, two in pairwise(self.engaged)),
        )


def rules_of(setup: Setup) -> BudgetRules:
    """The gateway's rules at its default settings."""
    return trust_rules(Settings().cache).budget(setup.budget)


def compare(calls: Sequence[Arrival], pool: Pool, setup: Setup) -> dict[str, Result]:
    """The same trace without a cache, with a fixed acceptance point, and with one that follows the load."""
    none, loaded = run(calls, pool, replace(setup, cached=False), None)
    fixed, _ = run(calls, pool, replace(setup, max_relax=0.0), loaded)
    adaptive, _ = run(calls, pool, setup, loaded)
    return {"none": none, "fixed": fixed, "adaptive": adaptive}


def modelled_pool(size: int = 20_000) -> Pool:
    """Candidates of an honest judge, from the mixture of the budget's simulation before any shift."""
    seed = next(seed for seed in range(1000) if (given := stream(seed, size)).judge == "honest" and given.shift == size)
    given = stream(seed, size)
    near = given.p > 0
    return Pool(given.p[near], given.wrong[near])


def calibrated(cosine: NDArray[np.float64], right: NDArray[np.bool_], seed: int = 0) -> Pool:
    """Turn similarities of labelled pairs into a judge's probabilities: fitted on one half, used on the other."""
    half = np.random.default_rng(seed).random(len(cosine)) < 0.5
    order = np.argsort(cosine[half], kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    centres = np.array([cosine[half][part].mean() for part in parts])
    shares = np.array([(right[half][part].sum() + 1.0) / (len(part) + 2.0) for part in parts])
    shares = np.maximum.accumulate(shares)
    return Pool(np.interp(cosine[~half], centres, shares), ~right[~half])


async def pairs_pool(names: Sequence[str]) -> Pool:
    """Candidates from sets of labelled pairs, scored by the local embedder's cosine. Raises DataError."""
    embedder = await open_embedder(Settings(), CategoryTable(CategoryPolicy("default"), {}))
    assert embedder is not None
    try:
        cosines: list[float] = []
        right: list[bool] = []
        for name in names:
            for row in read_rows(data_dir() / "pairs" / f"{name}.jsonl.gz"):
                if row["label"] not in (0, 1):
                    continue
                one, two = [(await embedder.embed(row[side])).vector for side in "ab"]
                cosines.append(float(one @ two))
                right.append(row["label"] == 1)
    finally:
        await embedder.close()
    return calibrated(np.array(cosines), np.array(right))


def scores_pool(path: Path) -> Pool:
    """Candidates from a file of scores. Raises DataError."""
    rows = list(read_rows(path))
    try:
        return Pool(np.array([float(row["p"]) for row in rows]), np.array([bool(row["wrong"]) for row in rows]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: rows need a number p and wrong: {error}") from error


def _pool(name: str) -> Pool:
    if name == "modelled":
        return modelled_pool()
    if Path(name).is_file():
        return scores_pool(Path(name))
    return asyncio.run(pairs_pool(name.split(",")))


_DEFAULT = Setup()
_TITLES = ("repeat", "cache", "kept", "kept, overloaded", "error", "checked", "429", "wait p95", "engaged", "changes")


def render(found: dict[float, dict[str, Result]]) -> str:
    """The runs as a Markdown table."""
    lines = [" | ".join(_TITLES), " | ".join(["---"] * len(_TITLES))]
    for repeat, runs in found.items():
        for name, result in runs.items():
            shares = (result.kept, result.kept_overloaded, result.error, result.checked, result.refused)
            cells = [f"{repeat:g}", name, *(f"{share:.3f}" for share in shares)]
            lines.append(" | ".join([*cells, f"{result.wait_p95:.1f} s", f"{result.engaged:.2f}", str(result.changes)]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.simulate_load", description=__doc__)
    parser.add_argument("--trace", choices=("conv", "code"), default="conv")
    parser.add_argument("--pool", default="modelled")
    parser.add_argument("--repeat", type=float, action="append")
    parser.add_argument("--overload", type=float, default=_DEFAULT.overload)
    parser.add_argument("--budget", type=float, default=_DEFAULT.budget)
    parser.add_argument("--wanted", type=float, default=_DEFAULT.wanted)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        calls = arrivals(read_rows(data_dir() / "traces" / f"azure2023_{options.trace}.jsonl.gz"))
        pool = _pool(options.pool)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    setup = Setup(overload=options.overload, budget=options.budget, wanted=options.wanted)
    found = {repeat: compare(calls, pool, replace(setup, repeat=repeat)) for repeat in options.repeat or REPEATS}
    if options.json:
        document = {
            f"{repeat:g}": {name: asdict(result) for name, result in runs.items()} for repeat, runs in found.items()
        }
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        sys.stdout.write(render(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
