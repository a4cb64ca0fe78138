"""Keys are moved by turning them by the difference of positions: exact, since turns add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cachestore.kv import native
from engine.attention import KvPool, LayerPool
from engine.reuse.chunks import BlendPrompt, Placed
from engine.rope import Rope, rotate

Turn = tuple[Tensor, Tensor]

_TOGETHER = {"cpu": 512}
"""Tokens turned at once: what a core's cache holds in float32, elsewhere `_MOST`."""
_MOST = 8192


def turn(rope: Rope, count: int, before: int, after: int, spans: tuple[int, int]) -> Turn | None:
    """What moves keys of positions `before`, `before + 1`, … to `after` and on; None: they are right already.

    `spans`: lengths of the text they were computed in and go to, where angles depend on those.
    """
    if before == after and (not rope.stretches or spans[0] == spans[1]):
        return None
    old, new = (
        (range(start, start + count), span if rope.stretches else None)
        for start, span in zip((before, after), spans, strict=True)
    )
    return rope.difference(old, new)


def moved(keys: Tensor, by: Turn | None) -> Tensor:
    """Keys [T, K, D] turned in float32, and rounded once."""
    return keys if by is None else rotate(keys.float(), *by).to(keys.dtype)


def take(pool: KvPool, slots: Tensor, rope: Rope, start: int, span: int) -> tuple[Tensor, ...]:
    """Per layer [2, T, K, D] of the tokens at these slots, which stand from `start` on, with keys as for 0, 1, …"""
    # Where angles depend on the length, that stays as it was: `ChunkKv.span` tells it.
    by = turn(rope, len(slots), start, 0, (span, span))
    found = (memory.read(slots) for memory in pool.layers)
    return tuple(torch.stack((moved(keys, by), values)) for keys, values in found)


def place(pool: KvPool, prompt: BlendPrompt, slots: Tensor, rope: Rope, *, turned: bool = True) -> None:
    """Write all chunks of a prompt to the pool; `slots` int64 [N] are those of its tokens.

    `turned=False` leaves keys as for the chunk's own positions, which is wrong, and there to measure how wrong.
    """
    placing = Placing(prompt, slots, rope, turned=turned)
    for index, memory in enumerate(pool.layers):
        placing.write(memory, [piece.chunk.layers[index] for piece in prompt.placed])


class Placing:
    """Where a prompt's chunks go and by how much their keys are turned, found out once for all layers."""

    def __init__(self, prompt: BlendPrompt, slots: Tensor, rope: Rope, *, start: int = 0, turned: bool = True) -> None:
        """`slots` int64 [N] are those of the prompt's tokens; what lies before `start` is left alone."""
        span = len(prompt.tokens)
        self._pieces = [
            (index, piece, run_of(slots[piece.start : piece.stop]), by)
            for index, placed in enumerate(prompt.placed)
            for piece in _cut(_behind(placed, start), _TOGETHER.get(slots.device.type, _MOST))
            for by in [_turn_of(rope, piece, span) if turned else None]
        ]

    def write(self, memory: LayerPool, layers: Sequence[Tensor]) -> None:
        """Write one layer of all chunks, [2, T, K, D] each, in the order of the prompt's."""
        for index, piece, slots, by in self._pieces:
            part = layers[index][:, piece.offset : piece.offset + piece.count]
            part = part.to(memory.keys.device, non_blocking=True)
            _write(memory, slots, part[0], by, part[1])


def _turn_of(rope: Rope, piece: Placed, span: int) -> Turn | None:
    """What moves a chunk's keys to where it is placed, in a prompt of `span` tokens."""
    spans = (piece.chunk.span or len(piece.chunk.tokens), span)
    return turn(rope, piece.count, piece.offset, piece.start, spans)


def _write(memory: LayerPool, slots: Tensor | slice, keys: Tensor, by: Turn | None, values: Tensor) -> None:
    """Put keys, turned, and values [T, K, D] at slots int64 [T], or a run of them; keys are rounded here, once."""
    known, held = (part.view(-1, *keys.shape[1:]) for part in (memory.keys, memory.values))
    if by is not None and native.ready(keys, known):
        native.place(known, slots, keys, by)
    else:
        _put(known, slots, moved(keys, by))
    _put(held, slots, values)


def _put(known: Tensor, slots: Tensor | slice, new: Tensor) -> None:
    if isinstance(slots, Tensor):
        known.index_copy_(0, slots, new)
    else:
        known[slots] = new


def _behind(piece: Placed, start: int) -> Placed:
    """What of it stands at `start` or behind; it may be nothing."""
    before = min(max(0, start - piece.start), piece.count)
    return replace(piece, start=piece.start + before, offset=piece.offset + before, count=piece.count - before)


def _cut(piece: Placed, most: int) -> Iterator[Placed]:
    """The same in pieces of so many tokens; nothing where it has none."""
    for done in range(0, piece.count, most):
        count = min(most, piece.count - done)
        yield replace(piece, start=piece.start + done, offset=piece.offset + done, count=count)


def run_of(slots: Tensor) -> Tensor | slice:
    """Slots side by side as a run, which is written many times faster; others, and a GPU's, as they are."""
    if slots.device.type != "cpu" or not len(slots):
        return slots
    first = int(slots[0])
    side_by_side = torch.equal(slots, torch.arange(first, first + len(slots)))
    return slice(first, first + len(slots)) if side_by_side else slots
