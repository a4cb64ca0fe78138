"""Documents, vectors and a clock for tests of the store."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cachestore import Document, Store, StoreOptions, Vector
from policies.eviction import ValuePerByte

DIM = 16
NOW = 1_000_000.0
OPTIONS = StoreOptions(
    memory_budget=64 << 20, disk_budget=64 << 20, max_body=1 << 20, embedder="test", stale_grace=100.0
)


class ManualClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def digest(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


def vector(seed: int, dim: int = DIM) -> Vector:
    drawn = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    unit: Vector = drawn / np.linalg.norm(drawn)
    return unit


def document(name: object, **changes: Any) -> Document:
    plain = Document(
        key=digest(name),
        scope=digest("scope"),
        namespace="team",
        category="code",
        model="model-a",
        endpoint="chat",
        upstream="local",
        text=f"question {name}",
        body=f'{{"answer": "{name}"}}'.encode(),
        created=NOW,
        expires=NOW + 1000.0,
        cost=1.0,
        vector=vector(int.from_bytes(digest(name)[:4], "big")),
    )
    return replace(plain, **changes)


async def open_store(directory: Path, clock: ManualClock | None = None, **changes: Any) -> Store:
    """A store whose background loading is done."""
    store = await Store.open(
        directory, replace(OPTIONS, **changes), eviction=ValuePerByte(), clock=clock or ManualClock()
    )
    await store.loaded.wait()
    return store


async def put(store: Store, wanted: Document) -> int:
    outcome = await store.put(wanted)
    assert isinstance(outcome, int), outcome
    return outcome
