"""Keys and values to store."""

from __future__ import annotations

import torch
from torch import Tensor

from cachestore.kv.format import Chunk, Geometry
from cachestore.kv.store import KvStore, Load, Refusal, Slot

GEOMETRY = Geometry("weights-1", layers=4, kv_heads=2, head_dim=16, dtype=torch.float32)
LONG = 2048
"""Tokens of a chunk whose layers are parts of their own."""


def chunk(seed: int, tokens: int = 24, **options: str) -> Chunk:
    return Chunk(tuple((seed * 7919 + i * 31) % 4096 for i in range(tokens)), **options)


def kv_of(wanted: Chunk, geometry: Geometry = GEOMETRY) -> Tensor:
    """What this chunk's keys and values are; the same every time."""
    generator = torch.Generator().manual_seed(wanted.tokens[0] + len(wanted.tokens))
    shape = (geometry.layers, 2, len(wanted.tokens), geometry.kv_heads, geometry.head_dim)
    return torch.randn(shape, generator=generator).to(geometry.dtype)


def stored(store: KvStore, *chunks: Chunk, codec: str = "raw") -> None:
    """Store these one after another, each when the one before is where it is to stay."""
    for one in chunks:
        slot = store.prepare_store(one, codec)
        assert isinstance(slot, Slot), slot
        store.complete_store(slot, kv_of(one))
        assert store.flush(20.0)


def loading(store: KvStore, *chunks: Chunk) -> Load:
    lookup = store.lookup(chunks)
    assert lookup.wait(10.0)
    return store.prepare_load(lookup)


def loaded(store: KvStore, *chunks: Chunk) -> list[Tensor | None]:
    """What the store has of these, all layers of each."""
    load = loading(store, *chunks)
    try:
        return load.whole()
    finally:
        store.complete_load(load)


def refused(answer: Slot | Refusal) -> Refusal:
    assert isinstance(answer, Refusal)
    return answer
