"""A chunk as the store takes it: one tensor, and a note of what neither tensor nor tokens say."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cachestore.kv import note_size
from engine.reuse.chunks import ChunkKv, ContextIndex
from engine.reuse.known import NAME

SEEN, REFINED = "seen", "refined"
"""Variants in the store: as a prompt computed it, and as computed again when there was time."""

_FIXED = struct.Struct("<BBxxII")
_REFINED, _SPANNED, _MEASURED, _INDEXED = 1, 2, 4, 8
_INDEX = struct.Struct("<fH")
"""Of a context index: its impact, and how many texts stand before; each is an `_ENTRY`, and behind them the attention
of every token on what is outside follows, as float16."""
_ENTRY = struct.Struct(f"<{NAME}se")
_OTHERS = bytes(NAME)
"""Instead of the texts that find no room in a note: no text's name, so they count as lost."""
_MOST_INTER = 65_000.0
"""What a float16 can hold."""


def refined_as(slot: int) -> str:
    """The variant of a refined chunk; there are several where each is of another context."""
    return f"{REFINED}{slot or ''}"


@dataclass(frozen=True, slots=True, eq=False)
class Noted:
    """What a note says; see `ChunkKv` for all but the first two."""

    refined: bool
    slot: int = 0
    """Which of the refined versions; see `refined_as`."""
    before: int = 0
    span: int | None = None
    sensitivity: Tensor | None = None
    context: ContextIndex | None = None

    def chunk(self, tokens: tuple[int, ...], layers: tuple[Tensor, ...] = ()) -> ChunkKv:
        """The chunk that it was written with; without `layers` they come from elsewhere."""
        return ChunkKv(
            tokens,
            layers,
            before=self.before,
            span=self.span,
            sensitivity=self.sensitivity,
            context=self.context,
        )


def note_of(chunk: ChunkKv, *, refined: bool, slot: int = 0) -> bytes:
    """All of a chunk but its tokens, keys and values; fits into `cachestore.kv.note_size`.

    There is room for a sensitivity or a context index: with an index, the sensitivity is left out.
    """
    rest, kind = b"", 0
    if chunk.context is not None:
        rest = _index(chunk.context, note_size(len(chunk.tokens)) - _FIXED.size)
        kind = _INDEXED * bool(rest)
    elif chunk.sensitivity is not None:
        rest, kind = chunk.sensitivity.cpu().numpy().astype("<f4").tobytes(), _MEASURED
    flags = _REFINED * refined | _SPANNED * (chunk.span is not None) | kind
    return _FIXED.pack(flags, slot, chunk.before, chunk.span or 0) + rest


def read_note(note: bytes, tokens: int) -> Noted:
    """What `note_of` wrote for a chunk of so many tokens; zeros may follow. An empty one is that of a plain chunk."""
    flags, slot, before, span = _FIXED.unpack_from(note.ljust(_FIXED.size, b"\0"))
    sensitivity = _floats(note, "<f4", tokens, _FIXED.size) if flags & _MEASURED else None
    context = _read_index(note, tokens) if flags & _INDEXED else None
    return Noted(bool(flags & _REFINED), slot, before, span if flags & _SPANNED else None, sensitivity, context)


def _index(context: ContextIndex, room: int) -> bytes:
    """A context index in so many bytes, of the texts those that were attended to most; nothing where none fits."""
    outside = context.outside.cpu().numpy().astype("<f2").tobytes()
    most = (room - _INDEX.size - len(outside)) // _ENTRY.size
    pairs = list(zip(context.prefix, context.inter, strict=True))
    if len(pairs) > most:
        if most < 2:
            return b""
        kept = {0, *sorted(range(1, len(pairs)), key=lambda place: -pairs[place][1])[: most - 2]}
        others = sum(mass for place, (_, mass) in enumerate(pairs) if place not in kept)
        pairs = [*(pair for place, pair in enumerate(pairs) if place in kept), (_OTHERS, others)]
    entries = (_ENTRY.pack(name, min(mass, _MOST_INTER)) for name, mass in pairs)
    return b"".join((_INDEX.pack(context.impact, len(pairs)), *entries, outside))


def _read_index(note: bytes, tokens: int) -> ContextIndex:
    """What `_index` wrote."""
    impact, count = _INDEX.unpack_from(note, _FIXED.size)
    first = _FIXED.size + _INDEX.size
    stop = first + count * _ENTRY.size
    entries = list(_ENTRY.iter_unpack(note[first:stop]))
    outside = _floats(note, "<f2", tokens, stop)
    return ContextIndex(tuple(name for name, _ in entries), tuple(mass for _, mass in entries), outside, impact)


def _floats(note: bytes, kind: str, count: int, offset: int) -> Tensor:
    """float32 [count]."""
    return torch.from_numpy(np.frombuffer(note, dtype=kind, count=count, offset=offset).astype(np.float32))


def stacked(chunk: ChunkKv) -> Tensor:
    """[layers, 2, T, K, D], a copy."""
    return torch.stack(chunk.layers)
