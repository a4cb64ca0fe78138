"""Keys are moved by turning them by the difference of positions: exact, since turns add up."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention import KvPool, LayerPool
from engine.reuse.chunks import BlendPrompt, Placed
from engine.rope import Rope, rotate

Turn = tuple[Tensor, Tensor]


def turn(rope: Rope, count: int, before: int, after: int, spans: tuple[int, int], device: torch.device) -> Turn | None:
    """What moves keys of positions `before`, `before + 1`, … to `after` and on; None: they are right already.

    `spans`: lengths of the text they were computed in and go to, where angles depend on those.
    """
    if before == after and (not rope.stretches or spans[0] == spans[1]):
        return None
    steps = torch.arange(count, device=device)
    old, new = (
        (steps + start, torch.full_like(steps, span) if rope.stretches else None)
        for start, span in zip((before, after), spans, strict=True)
    )
    return rope.difference(old, new)


def moved(keys: Tensor, by: Turn | None) -> Tensor:
    """Keys [T, K, D] turned in float32, and rounded once."""
    return keys if by is None else rotate(keys.float(), *by).to(keys.dtype)


def take(pool: KvPool, slots: Tensor, rope: Rope, start: int, span: int) -> tuple[Tensor, ...]:
    """Per layer [2, T, K, D] of the tokens at these slots, which stand from `start` on, with keys as for 0, 1, …"""
    # Where angles depend on the length, that stays as it was: `ChunkKv.span` tells it.
    by = turn(rope, len(slots), start, 0, (span, span), slots.device)
    found = (memory.read(slots) for memory in pool.layers)
    return tuple(torch.stack((moved(keys, by), values)) for keys, values in found)


def place(pool: KvPool, prompt: BlendPrompt, slots: Tensor, rope: Rope, *, turned: bool = True) -> None:
    """Write all chunks of a prompt to the pool; `slots` int64 [N] are those of its tokens.

    `turned=False` leaves keys as for the chunk's own positions, which is wrong, and there to measure how wrong.
    """
    for piece in prompt.placed:
        by = turn_of(rope, piece, len(prompt.tokens), slots.device) if turned else None
        run = run_of(slots[piece.start : piece.stop])
        for memory, layer in zip(pool.layers, piece.chunk.layers, strict=True):
            write(memory, piece, layer, run, by)


def turn_of(rope: Rope, piece: Placed, span: int, device: torch.device) -> Turn | None:
    """What moves a chunk's keys to where it is placed, in a prompt of `span` tokens."""
    spans = (piece.chunk.span or len(piece.chunk.tokens), span)
    return turn(rope, piece.count, piece.offset, piece.start, spans, device)


def write(memory: LayerPool, piece: Placed, layer: Tensor, slots: Tensor | slice, by: Turn | None) -> None:
    """Put what is placed of a chunk, whose [2, T, K, D] `layer` is, at slots int64 [count], or a run of them."""
    part = layer[:, piece.offset : piece.offset + piece.count].to(memory.keys.device, non_blocking=True)
    keys = moved(part[0], by)
    if isinstance(slots, Tensor):
        memory.write(slots, keys, part[1])
    else:
        memory.keys.view(-1, *keys.shape[1:])[slots] = keys
        memory.values.view(-1, *keys.shape[1:])[slots] = part[1]


def run_of(slots: Tensor) -> Tensor | slice:
    """Slots side by side as a run, which is written many times faster; others, and a GPU's, as they are."""
    if slots.device.type != "cpu" or not len(slots):
        return slots
    first = int(slots[0])
    side_by_side = torch.equal(slots, torch.arange(first, first + len(slots)))
    return slice(first, first + len(slots)) if side_by_side else slots
