"""Prompts with chunks among the others of a step: what is placed before each layer, and which tokens go on.

All chunks of a sequence are placed in the first step after its admission, each layer just before it is computed, so
that loading goes on beside computing. Where a chunk does not come, the step is of no use to that sequence, and is not
taken over for it: nothing of what it wrote is ever read, and it is computed like any other from then on.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention import LayerPool, Packed
from engine.model import Turned
from engine.reuse.blending import Look, Selector, look_at
from engine.reuse.chunks import BlendPrompt
from engine.reuse.placing import Placing
from engine.rope import Rope
from engine.sequence import Dropped, Positions

log = logging.getLogger("hitpath.engine")


class Source(Protocol):
    """Where the layers of a prompt's chunks come from. Called on the worker's thread."""

    def layer(self, index: int) -> Sequence[Tensor | None]:
        """[2, T, K, D] of each chunk of `BlendPrompt.placed`, whole and not turned, on any device; None: it is lost.

        May wait. Asked for 0, 1, … in turn, and from 0 on again where a step broke: whoever cannot says None.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Blended:
    """What an admitted sequence reuses."""

    prompt: BlendPrompt
    """Of its whole prompt. What would be placed before `Sequence.computed` is not."""
    selector: Selector
    source: Source | None = None
    """None: the chunks have their layers."""
    ranked: bool = False
    """Kept tokens will be repaired beside those drawn: what is dropped is told with what it costs."""

    def kept(self) -> Positions:
        """Those that `selector` says are not computed, before it has seen anything."""
        left = self.prompt.reused & ~self.selector.choose(self.prompt)
        return left.nonzero()[:, 0].numpy().astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens `start` to `stop` of a blended sequence, as a step has them."""

    blended: Blended
    start: int
    stop: int
    rows: Positions
    """Those computed; the last one is in all layers."""
    slots: Tensor | None
    """int64 [N], of all tokens of the prompt, where its chunks are to be placed; None: they are there."""


class StepBlend:
    """The blended sequences of one step on their way through the layers; see `engine.model.Narrowing`."""

    def __init__(self, pieces: Mapping[int, Piece], rope: Rope) -> None:
        """`pieces` by place in the step."""
        self._pieces = pieces
        self._placings = {
            index: _Coming(piece.blended, piece.start, piece.slots, rope)
            for index, piece in pieces.items()
            if piece.slots is not None
        }
        self._checks = frozenset(layer for piece in pieces.values() for layer in piece.blended.selector.checks)
        self._left: dict[int, Tensor] = {}
        """Positions still computed, where some were dropped."""
        self._missed: dict[int, Tensor] = {}
        """Where that is asked for and known: float32, what each token of a piece is missed where it was dropped."""
        self.lost: set[int] = set()
        """Places of those whose chunks did not all come."""

    def dropped(self) -> dict[int, Dropped]:
        """By place in the step, the tokens that were not computed in all layers."""
        return {index: self._dropped(index, left) for index, left in self._left.items() if index not in self.lost}

    def _dropped(self, index: int, left: Tensor) -> Dropped:
        positions = np.setdiff1d(self._pieces[index].rows, left.cpu().numpy(), assume_unique=True)
        missed = self._missed.get(index)
        return Dropped(positions, None if missed is None else missed[positions - self._pieces[index].start].numpy())

    def before(self, layer: int, memory: LayerPool, packed: Packed) -> tuple[Tensor, Tensor] | None:
        """See `Narrowing`."""
        for index, placing in self._placings.items():
            if index not in self.lost and not placing.place(layer, memory):
                self.lost.add(index)
        return memory.read(packed.slots) if layer in self._checks else None

    def narrow(self, layer: int, turned: Turned) -> tuple[Tensor, Packed] | None:
        """See `Narrowing`."""
        packed = turned.packed
        stays = torch.ones_like(packed.positions, dtype=torch.bool)
        counts = list(packed.counts)
        ends = tuple(accumulate(counts))
        for index, piece in self._pieces.items():
            if layer not in piece.blended.selector.checks or index in self.lost:
                continue
            rows = slice(ends[index] - counts[index], ends[index])
            look = _look(piece, turned, index, rows)
            stays[rows] = _stays(layer, piece, look)
            self._miss(index, look, ~stays[rows])
            self._left[index] = packed.positions[rows][stays[rows]]
            counts[index] = len(self._left[index])
        if sum(counts) == len(stays):
            return None
        firsts = list(packed.firsts or map(operator.sub, packed.totals, packed.counts))
        for index, left in self._left.items():
            firsts[index] = int(left[0])
        kept = stays.nonzero()[:, 0]
        return kept, packed.narrowed(kept, tuple(counts), tuple(firsts))

    def _miss(self, index: int, look: Look, dropped: Tensor) -> None:
        """Take down what the dropped rows of a piece are missed."""
        piece = self._pieces[index]
        if not piece.blended.ranked or (missed := piece.blended.selector.missed(look)) is None:
            return
        known = self._missed.setdefault(index, torch.full((piece.stop - piece.start,), -torch.inf))
        known[(look.positions[dropped] - piece.start).cpu()] = missed[dropped].cpu()


class _Coming:
    """One sequence's chunks on their way into the pool."""

    def __init__(self, blended: Blended, start: int, slots: Tensor, rope: Rope) -> None:
        """What lies before `start` is known, may be shared, and is left alone."""
        self._blended = blended
        self._placing = Placing(blended.prompt, slots, rope, start=start)

    def place(self, layer: int, memory: LayerPool) -> bool:
        """Write this layer of all chunks; False if one of them is lost."""
        layers = [tensor for tensor in self._layer(layer) if tensor is not None]
        if len(layers) < len(self._blended.prompt.placed):
            return False
        self._placing.write(memory, layers)
        return True

    def _layer(self, layer: int) -> Sequence[Tensor | None]:
        source = self._blended.source
        if source is None:
            return [piece.chunk.layers[layer] for piece in self._blended.prompt.placed]
        try:
            return source.layer(layer)
        except Exception:  # whatever it is, the tokens can be computed
            log.exception("chunks could not be loaded")
            return []


def _look(piece: Piece, turned: Turned, index: int, rows: slice) -> Look:
    """What there is to see of a piece."""
    prompt = piece.blended.prompt
    return look_at(prompt, int(prompt.reused[piece.start : piece.stop].sum()), turned, index, rows)


def _stays(layer: int, piece: Piece, look: Look) -> Tensor:
    """bool: which rows of a piece are computed further."""
    stays = piece.blended.selector.narrow(layer, look) | ~look.reused
    stays[-1] = True
    return stays
