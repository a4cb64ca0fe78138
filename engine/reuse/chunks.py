"""A chunk: tokens whose keys and values were computed once, and a prompt in which such chunks stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ChunkKv:
    """What is kept of a chunk. Complete in itself: nothing in it depends on where it will be placed."""

    tokens: tuple[int, ...]
    layers: tuple[Tensor, ...]
    """Per layer [2, T, K, D], keys and values, in the engine's dtype; keys as for positions 0, 1, …"""
    before: int = 0
    """Tokens that stood before it when it was computed; 0: it was computed alone, and is exact at a prompt's start."""
    span: int | None = None
    """Length of the text it was computed in, where rotary angles depend on that; None: its own length."""
    sensitivity: Tensor | None = None
    """float32 [T]: how much keys and values change with what stands before, measured once when there was time."""
    context: ContextIndex | None = None
    """Whom its tokens attended to where it was computed; only Cache-Craft asks for it."""

    def __post_init__(self) -> None:
        if not self.tokens or any(layer.shape[:2] != (2, len(self.tokens)) for layer in self.layers):
            raise ValueError(
                f"a chunk of {len(self.tokens)} tokens needs keys and values of all of them in every layer"
            )


@dataclass(frozen=True, slots=True, eq=False)
class ContextIndex:
    """Cache-Craft's record of a chunk's first surroundings (arXiv 2502.15734, section 3)."""

    prefix: tuple[bytes, ...]
    """Names of what the prompt began with, before its first text, and of the texts before the chunk, in order."""
    inter: tuple[float, ...]
    """Attention of its tokens on each of them and what follows it up to the next, mean over layers and heads."""
    outside: Tensor
    """float32 [T]: attention of each token on everything before the chunk."""
    impact: float
    """CCI: sigmoid of inter over intra attention, both normalised by length; in [0, 1]."""


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Tokens `start` to `start + count` of a prompt are those from `offset` on of a chunk."""

    chunk: ChunkKv
    start: int
    offset: int
    count: int
    name: bytes = b""
    """Of the chunk's text, as others' context indices call it."""

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + self.count

    @property
    def exact(self) -> bool:
        """It was computed alone from position 0 on, and stands there again."""
        return self.start == self.offset == self.chunk.before == 0


@dataclass(frozen=True, slots=True, eq=False)
class BlendPrompt:
    """A prompt and the chunks in it, in order and apart from each other; the rest is computed anyway."""

    tokens: Sequence[int]
    placed: tuple[Placed, ...]
    texts: tuple[tuple[int, bytes], ...] = ()
    """Where all of its texts begin, placed or not, and their names, in order; the first is what it begins with, up to
    the next, and may be empty. None: those placed are all there are."""
    reused: Tensor = field(init=False)
    """bool [N]: keys and values are there, from elsewhere. Never the last token, whose scores are wanted."""

    def __post_init__(self) -> None:
        reused, end = torch.zeros(len(self.tokens), dtype=torch.bool), 0
        for piece in self.placed:
            if piece.start < end or piece.stop > len(self.tokens) or piece.count < 1:
                raise ValueError("chunks must lie in the prompt, in order, and must not overlap")
            stored = piece.chunk.tokens[piece.offset : piece.offset + piece.count]
            if tuple(self.tokens[piece.start : piece.stop]) != stored:
                raise ValueError(f"at {piece.start} the prompt has other tokens than the chunk")
            reused[piece.start : piece.stop] = True
            end = piece.stop
        if len(self.tokens):
            reused[-1] = False
        object.__setattr__(self, "reused", reused)
        if not self.texts:
            placed = ((piece.start, piece.name) for piece in self.placed)
            object.__setattr__(self, "texts", ((0, b""), *placed))


def names_before(texts: Sequence[tuple[int, bytes]], start: int) -> tuple[bytes, ...]:
    """Names of what stands before the text that begins at a position, as in `ContextIndex`; `texts`: `BlendPrompt`."""
    return tuple(name for place, (at, name) in enumerate(texts) if not place or at < start)
