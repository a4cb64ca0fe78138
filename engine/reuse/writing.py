"""A chunk as the store takes it: one tensor, and a note of what neither tensor nor tokens say."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.reuse.chunks import ChunkKv

SEEN, REFINED = "seen", "refined"
"""Variants in the store: as a prompt computed it, and as computed again when there was time."""

_FIXED = struct.Struct("<BxxxII")
_REFINED, _SPANNED, _MEASURED = 1, 2, 4


@dataclass(frozen=True, slots=True, eq=False)
class Noted:
    """What a note says; see `ChunkKv` for all but the first."""

    refined: bool
    before: int = 0
    span: int | None = None
    sensitivity: Tensor | None = None

    def chunk(self, tokens: tuple[int, ...], layers: tuple[Tensor, ...] = ()) -> ChunkKv:
        """The chunk that it was written with; without `layers` they come from elsewhere."""
        return ChunkKv(tokens, layers, before=self.before, span=self.span, sensitivity=self.sensitivity)


def note_of(chunk: ChunkKv, *, refined: bool) -> bytes:
    """All of a chunk but its tokens, keys and values; fits into `cachestore.kv.note_size`."""
    flags = _REFINED * refined | _SPANNED * (chunk.span is not None) | _MEASURED * (chunk.sensitivity is not None)
    fixed = _FIXED.pack(flags, chunk.before, chunk.span or 0)
    if chunk.sensitivity is None:
        return fixed
    return fixed + chunk.sensitivity.cpu().numpy().astype("<f4").tobytes()


def read_note(note: bytes, tokens: int) -> Noted:
    """What `note_of` wrote for a chunk of so many tokens; zeros may follow. An empty one is that of a plain chunk."""
    flags, before, span = _FIXED.unpack_from(note.ljust(_FIXED.size, b"\0"))
    sensitivity = None
    if flags & _MEASURED:
        values = np.frombuffer(note, dtype="<f4", count=tokens, offset=_FIXED.size)
        sensitivity = torch.from_numpy(values.astype(np.float32))
    return Noted(bool(flags & _REFINED), before, span if flags & _SPANNED else None, sensitivity)


def stacked(chunk: ChunkKv) -> Tensor:
    """[layers, 2, T, K, D], a copy."""
    return torch.stack(chunk.layers)
