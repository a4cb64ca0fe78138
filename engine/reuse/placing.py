"""Keys are moved by turning them by the difference of positions: exact, since turns add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.attention import KvPool, LayerPool
from engine.reuse.chunks import BlendPrompt, Placed
from engine.rope import Rope, rotate

Turn = tuple[Tensor, Tensor]

_TOGETHER = 8192
"""Tokens turned at once: bounds the memory that this takes."""


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
    placing = Placing(prompt, slots, rope, turned=turned)
    for index, memory in enumerate(pool.layers):
        placing.write(memory, [piece.chunk.layers[index] for piece in prompt.placed])


class Placing:
    """Where a prompt's chunks go and by how much their keys are turned, found out once for all layers."""

    def __init__(self, prompt: BlendPrompt, slots: Tensor, rope: Rope, *, start: int = 0, turned: bool = True) -> None:
        """`slots` int64 [N] are those of the prompt's tokens; what lies before `start` is left alone."""
        span = len(prompt.tokens)
        self._groups: list[_Group] = []
        group: list[tuple[int, Placed]] = []
        for index, placed in enumerate(prompt.placed):
            piece = _behind(placed, start)
            if group and sum(other.count for _, other in group) + piece.count > _TOGETHER:
                self._groups.append(_Group(group, slots, rope, span, turned=turned))
                group = []
            if piece.count:
                group.append((index, piece))
        if group:
            self._groups.append(_Group(group, slots, rope, span, turned=turned))

    def write(self, memory: LayerPool, layers: Sequence[Tensor]) -> None:
        """Write one layer of all chunks, [2, T, K, D] each, in the order of the prompt's."""
        for group in self._groups:
            group.write(memory, layers)


class _Group:
    """Pieces that are turned together: on a CPU every small step costs its threads' waking up."""

    def __init__(
        self, pieces: Sequence[tuple[int, Placed]], slots: Tensor, rope: Rope, span: int, *, turned: bool
    ) -> None:
        self._pieces = pieces
        self._slots = [run_of(slots[piece.start : piece.stop]) for _, piece in pieces]
        turns = [_turn_of(rope, piece, span, slots.device) for _, piece in pieces] if turned else [None]
        self._by = None if all(by is None for by in turns) else _together(turns, [piece.count for _, piece in pieces])

    def write(self, memory: LayerPool, layers: Sequence[Tensor]) -> None:
        """See `Placing`."""
        parts = [
            layers[index][:, piece.offset : piece.offset + piece.count].to(memory.keys.device, non_blocking=True)
            for index, piece in self._pieces
        ]
        keys = [part[0] for part in parts]
        if self._by is not None:
            whole = torch.cat(keys) if len(keys) > 1 else keys[0]
            keys = list(torch.split(rotate(whole.float(), *self._by), [len(part) for part in keys]))
        for slots, key, part in zip(self._slots, keys, parts, strict=True):
            _write(memory, slots, key, part[1])


def _together(turns: Sequence[Turn | None], counts: Sequence[int]) -> Turn:
    """The turns of pieces one after the other; by nothing where there is none."""
    size = next(by[0].shape[-1] for by in turns if by is not None)
    device = next(by[0].device for by in turns if by is not None)
    still = [(torch.ones(n, 1, size, device=device), torch.zeros(n, 1, size, device=device)) for n in counts]
    both = [one if by is None else by for by, one in zip(turns, still, strict=True)]
    return torch.cat([cos for cos, _ in both]), torch.cat([sin for _, sin in both])


def _turn_of(rope: Rope, piece: Placed, span: int, device: torch.device) -> Turn | None:
    """What moves a chunk's keys to where it is placed, in a prompt of `span` tokens."""
    spans = (piece.chunk.span or len(piece.chunk.tokens), span)
    return turn(rope, piece.count, piece.offset, piece.start, spans, device)


def _write(memory: LayerPool, slots: Tensor | slice, keys: Tensor, values: Tensor) -> None:
    """Put keys and values [T, K, D] at slots int64 [T], or a run of them; keys are rounded here, once."""
    if isinstance(slots, Tensor):
        memory.write(slots, keys.to(values.dtype), values)
    else:
        memory.keys.view(-1, *keys.shape[1:])[slots] = keys
        memory.values.view(-1, *keys.shape[1:])[slots] = values


def _behind(piece: Placed, start: int) -> Placed:
    """What of it stands at `start` or behind; it may be nothing."""
    before = min(max(0, start - piece.start), piece.count)
    return replace(piece, start=piece.start + before, offset=piece.offset + before, count=piece.count - before)


def run_of(slots: Tensor) -> Tensor | slice:
    """Slots side by side as a run, which is written many times faster; others, and a GPU's, as they are."""
    if slots.device.type != "cpu" or not len(slots):
        return slots
    first = int(slots[0])
    side_by_side = torch.equal(slots, torch.arange(first, first + len(slots)))
    return slice(first, first + len(slots)) if side_by_side else slots
