"""Measures the store: bytes of memory per entry, recall after churn, start-up, and the cost of its verbs.

`python -m loadtest.bench_store [--json] [--entries N]`. Each part runs in a process of its own, so that none inherits
another's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from cachestore import Document, Filter, Store, StoreOptions
from policies.eviction import ValuePerByte

P = ParamSpec("P")
T = TypeVar("T")
DIM = 384
_ONE_SCOPE = b"one-scope-of-all"
_OPTIONS = StoreOptions(memory_budget=4 << 30, disk_budget=16 << 30, max_body=1 << 20, embedder="bench")


class Mixture:
    """Unit vectors in clusters that share a direction, as embeddings of one corpus do."""

    def __init__(self, seed: int, clusters: int = 2000) -> None:
        self._random = np.random.default_rng(seed)
        common = self._random.standard_normal((1, DIM)).astype(np.float32)
        self._centres = _unit(self._random.standard_normal((clusters, DIM)).astype(np.float32) + common)

    def draw(self, count: int) -> NDArray[np.float32]:
        """[count, DIM]."""
        return self._near(self._centres[self._random.integers(len(self._centres), size=count)], 0.035)

    def paraphrases(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Close to given vectors, as other words for the same question are."""
        return self._near(vectors, 0.02)

    def _near(self, vectors: NDArray[np.float32], spread: float) -> NDArray[np.float32]:
        noise = self._random.standard_normal(vectors.shape).astype(np.float32)
        return _unit(vectors + spread * noise)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def document(number: int, vector: NDArray[np.float32], scope: bytes) -> Document:
    """An answer of the size of a short chat completion."""
    words = " ".join(f"word{(number * 31 + i) % 977}" for i in range(60))
    now = time.time()
    return Document(
        key=number.to_bytes(16, "big"),
        scope=scope,
        namespace="bench",
        category="general",
        model="model",
        endpoint="chat",
        upstream="upstream",
        text=f"question number {number}",
        body=json.dumps({"choices": [{"message": {"content": words}}]}).encode(),
        created=now,
        expires=now + 86400,
        cost=1.0,
        vector=vector,
    )


async def fill(store: Store, vectors: NDArray[np.float32], scope_of: Callable[[int], bytes], first: int = 1) -> float:
    """Put documents, 256 at a time; returns documents per second."""
    begun = time.perf_counter()
    for start in range(0, len(vectors), 256):
        numbers = range(start, min(start + 256, len(vectors)))
        outcomes = await asyncio.gather(
            *(store.put(document(first + n, vectors[n], scope_of(first + n))) for n in numbers)
        )
        assert all(isinstance(outcome, int) for outcome in outcomes), outcomes
    return len(vectors) / (time.perf_counter() - begun)


async def settled(store: Store) -> None:
    """Wait until everything is loaded and no vector is on its way into a graph."""
    await store.loaded.wait()
    while True:
        await asyncio.sleep(0.05)
        if not store.pouring:
            return


@dataclass(frozen=True, slots=True)
class MemoryPerEntry:
    """Resident bytes per entry, bodies excluded."""

    entries: int
    scopes: int
    bytes_per_entry: float
    accounted_per_entry: float
    """What the store itself reckons against its budget."""


def memory_per_entry(entries: int, *, one_scope: bool) -> MemoryPerEntry:
    """Fill a store, start a new process on it (as after a restart: no hot bodies), read its resident memory."""
    with tempfile.TemporaryDirectory() as directory:
        _child(_fill_directory, Path(directory), entries, one_scope)
        resident, accounted, scopes = _child(_load_and_weigh, Path(directory))
    return MemoryPerEntry(entries, scopes, resident / entries, accounted / entries)


def _fill_directory(directory: Path, entries: int, one_scope: bool) -> float:
    async def run() -> float:
        store = await Store.open(directory, _OPTIONS, eviction=ValuePerByte())
        mixture = Mixture(1)
        speed = 0.0
        for start in range(0, entries, 10_000):
            vectors = mixture.draw(min(10_000, entries - start))
            speed = await fill(store, vectors, _scopes(one_scope), first=start + 1)
        await store.close()
        return speed

    return asyncio.run(run())


def _scopes(one_scope: bool) -> Callable[[int], bytes]:
    return (lambda _: _ONE_SCOPE) if one_scope else (lambda number: (number << 64).to_bytes(16, "big"))


def _load_and_weigh(directory: Path) -> tuple[int, int, int]:
    async def run() -> tuple[int, int, int]:
        empty = Path(tempfile.mkdtemp(dir=directory))
        warm = await Store.open(empty, _OPTIONS, eviction=ValuePerByte())
        await fill(warm, Mixture(2).draw(512), lambda _: b"")
        await warm.close()
        gc.collect()
        before = _resident()
        store = await Store.open(directory, _OPTIONS, eviction=ValuePerByte())
        await settled(store)
        gc.collect()
        weighed = _resident() - before, store.stats().memory_used, store.stats().scopes
        await store.close()
        return weighed

    return asyncio.run(run())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall@1 of the index against a flat search over the same vectors, and what each search costs."""

    entries: int
    before_churn: float
    after_churn: float
    search_ms: float
    flat_ms: float


def recall_after_churn(entries: int = 50_000, queries: int = 1000) -> Recall:
    """Fill one scope, delete half, add as many new ones."""
    return _child(_recall_after_churn, entries, queries)


def _recall_after_churn(entries: int, queries: int) -> Recall:
    async def run() -> Recall:
        with tempfile.TemporaryDirectory() as directory:
            store = await Store.open(Path(directory), _OPTIONS, eviction=ValuePerByte())
            mixture = Mixture(3)
            vectors = mixture.draw(entries)
            await fill(store, vectors, _scopes(one_scope=True))
            await settled(store)
            before, _, _ = _recall(store, vectors, np.arange(1, entries + 1), mixture, queries)
            dead = np.random.default_rng(4).permutation(entries)[: entries // 2]
            await store.purge(Filter(ids=tuple((dead + 1).tolist())))
            fresh = mixture.draw(len(dead))
            await fill(store, fresh, _scopes(one_scope=True), first=entries + 1)
            await settled(store)
            kept = np.setdiff1d(np.arange(entries), dead)
            ids = np.concatenate([kept + 1, np.arange(entries + 1, entries + 1 + len(fresh))])
            live = np.concatenate([vectors[kept], fresh])
            after, search, flat = _recall(store, live, ids, mixture, queries)
            problems = await store.check()
            assert not problems, problems
            await store.close()
            return Recall(entries, before, after, search, flat)

    return asyncio.run(run())


def _recall(
    store: Store, vectors: NDArray[np.float32], ids: NDArray[np.int64], mixture: Mixture, count: int
) -> tuple[float, float, float]:
    """Recall@1, p50 in ms of the store's search and of a flat one; half the queries are paraphrases, half are new."""
    picks = np.random.default_rng(5).integers(len(vectors), size=count // 2)
    queries = np.concatenate([mixture.paraphrases(vectors[picks]), mixture.draw(count - count // 2)])
    right, searches, flats = 0, [], []
    for query in queries:
        begun = time.perf_counter()
        best = int(ids[np.argmax(vectors @ query)])
        between = time.perf_counter()
        found = store.search(_ONE_SCOPE, query, 4, -1.0)
        searches.append(time.perf_counter() - between)
        flats.append(between - begun)
        right += bool(found) and found[0].id == best
    return right / count, statistics.median(searches) * 1e3, statistics.median(flats) * 1e3


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds from `open` on a filled directory."""

    entries: int
    first_exact_hit: float
    loaded: float
    """Every entry is found by key and by meaning (by a flat search where graphs are still being built)."""
    graphs_built: float
    longest_pause: float
    """The longest time that the event loop did not turn meanwhile."""


def start_up(entries: int = 100_000) -> StartUp:
    """Fill one scope, open it in a new process."""
    with tempfile.TemporaryDirectory() as directory:
        _child(_fill_directory, Path(directory), entries, True)
        return _child(_start_up, Path(directory), entries)


def _start_up(directory: Path, entries: int) -> StartUp:
    async def run() -> StartUp:
        pauses: list[float] = []
        watch = asyncio.create_task(_watch_pauses(pauses))
        begun = time.perf_counter()
        store = await Store.open(directory, _OPTIONS, eviction=ValuePerByte())
        hit = await store.get((entries // 2).to_bytes(16, "big"))
        assert hit is not None
        first = time.perf_counter() - begun
        await store.loaded.wait()
        loaded = time.perf_counter() - begun
        await settled(store)
        built = time.perf_counter() - begun
        watch.cancel()
        await store.close()
        return StartUp(entries, first, loaded, built, max(pauses))

    return asyncio.run(run())


async def _watch_pauses(pauses: list[float]) -> None:
    while True:
        begun = time.perf_counter()
        await asyncio.sleep(0.001)
        pauses.append(time.perf_counter() - begun - 0.001)


@dataclass(frozen=True, slots=True)
class Verbs:
    """Medians in microseconds, and puts per second in groups of 256."""

    entries: int
    puts_per_second: float
    put_alone_us: float
    hot_us: float
    get_from_log_us: float
    get_absent_us: float
    search_flat_1000_us: float
    search_one_entry_us: float


def verbs(entries: int = 20_000) -> Verbs:
    """The cost of each verb on a store of scopes of 1 000."""
    return _child(_verbs, entries)


def _verbs(entries: int) -> Verbs:
    async def run() -> Verbs:
        with tempfile.TemporaryDirectory() as directory:
            store = await Store.open(Path(directory), _OPTIONS, eviction=ValuePerByte())
            mixture = Mixture(6)
            vectors = mixture.draw(entries)
            speed = await fill(store, vectors, lambda number: (number // 1000).to_bytes(16, "big"))
            alone = document(entries + 1, vectors[0], b"a scope of its o")
            put = await _median_async(store.put, [alone] * 200)
            keys = [number.to_bytes(16, "big") for number in range(1, 1001)]
            hot = _median(store.hot, keys * 10)
            absent = await _median_async(store.get, [b"not in the store"] * 1000)
            scope = (entries // 2000).to_bytes(16, "big")
            flat = _median(lambda vector: store.search(scope, vector, 4, 0.5), list(vectors[:1000]))
            single = _median(lambda vector: store.search(alone.scope, vector, 4, 0.5), list(vectors[:1000]))
            await store.close()
            store = await Store.open(Path(directory), _OPTIONS, eviction=ValuePerByte())
            await store.loaded.wait()
            cold = await _median_async(store.get, keys)
            await store.close()
            return Verbs(entries, speed, put, hot, cold, absent, flat, single)

    return asyncio.run(run())


def _median(call: Callable[[T], object], arguments: Sequence[T]) -> float:
    times = []
    for argument in arguments:
        begun = time.perf_counter()
        call(argument)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


async def _median_async(call: Callable[[T], Awaitable[object]], arguments: Sequence[T]) -> float:
    times = []
    for argument in arguments:
        begun = time.perf_counter()
        await call(argument)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def _child(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run in a fresh interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments, named)


def measure(entries: int = 100_000) -> dict[str, Any]:
    """Everything; about four minutes on two cores at 100 000 entries."""
    return {
        "one_scope": asdict(memory_per_entry(entries, one_scope=True)),
        "own_scopes": asdict(memory_per_entry(entries // 2, one_scope=False)),
        "recall": asdict(recall_after_churn(entries // 2)),
        "start_up": asdict(start_up(entries)),
        "verbs": asdict(verbs(entries // 5)),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--entries", type=int, default=100_000, help="entries of the largest store")
    arguments = parser.parse_args()
    figures = measure(arguments.entries)
    if arguments.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
        return
    for part, values in figures.items():
        for name, value in values.items():
            print(
                f"{part + '.' + name:36} {value:>14,.3f}"
                if isinstance(value, float)
                else f"{part + '.' + name:36} {value:>14,}"
            )


if __name__ == "__main__":
    main()
