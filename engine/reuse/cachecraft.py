"""Cache-Craft's rule (arXiv 2502.15734): chunks kept as first prompts computed them, and their repair.

Where a chunk is computed in a prompt, its context index says how much its tokens attended to each chunk before
it. Placed behind others, the more of that attention is lost, the more of its tokens are computed again: those first
that had attended most to what stood before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from engine.attention import LayerPool, Packed
from engine.model import Turned
from engine.reuse.blending import Look, best
from engine.reuse.chunks import BlendPrompt, ChunkKv, ContextIndex

_SCALE = 1.0
"""The paper's α where nobody calibrated another."""


class Observer:
    """Sums up attention by segment while a whole prompt is computed; a `Narrowing` that drops nothing."""

    def __init__(self, ends: Sequence[int]) -> None:
        """`ends`: position behind each segment, ascending; the last one is the prompt's length."""
        sizes = torch.diff(torch.tensor([0, *ends]))
        self._segment = torch.repeat_interleave(torch.arange(len(ends)), sizes)
        self._layers = 0
        self._mass = torch.zeros(ends[-1], len(ends))

    @property
    def mass(self) -> Tensor:
        """float32 [N, S]: attention of each token on each segment, mean over layers and heads; rows sum to 1."""
        return self._mass / self._layers

    def before(self, layer: int, memory: LayerPool, packed: Packed) -> tuple[Tensor, Tensor] | None:
        """See `Narrowing`."""
        return memory.read(packed.slots)

    def narrow(self, layer: int, turned: Turned) -> tuple[Tensor, Packed] | None:
        """See `Narrowing`."""
        queries, keys = turned.queries.float(), turned.keys.float()
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(queries.shape[-1])
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1).mean(0).cpu()
        self._mass.index_add_(1, self._segment, weights)
        self._layers += 1
        return None


def context_index(mass: Tensor, names: Sequence[bytes], ends: Sequence[int], which: int) -> ContextIndex:
    """The context index of segment `which` of an observed prompt; `names` of all segments."""
    start, stop = (0, *ends)[which], ends[which]
    rows = mass[start:stop]
    inter, intra = rows[:, :which].sum(0), float(rows[:, which].sum())
    size = stop - start
    before = float(inter.sum()) / (size * max(1, start))
    within = intra / (size * size)
    impact = 1 / (1 + math.exp(-before / within)) if within else 1.0
    return ContextIndex(tuple(names[:which]), tuple(inter.tolist()), rows[:, :which].sum(1), impact)


def overlap(context: ContextIndex, prefix: Sequence[bytes]) -> float:
    """β′: share of the chunk's attention on others that stands before it again, less what their order differs."""
    total = sum(context.inter)
    if not total:
        return 1.0
    kept = sum(mass for name, mass in zip(context.prefix, context.inter, strict=True) if name in prefix)
    return kept / total * (1 - _disorder([name for name in context.prefix if name in prefix], prefix))


def overhead(context: ContextIndex | None, prefix: Sequence[bytes], scale: float = _SCALE) -> float:
    """CFO: share of the chunk's tokens to compute again, in [0, 1]. Without an index nothing is known: half of it."""
    if context is None:
        return min(1.0, scale / 2)
    return min(1.0, scale * context.impact * (1 - overlap(context, prefix)))


def version(versions: Sequence[ChunkKv], prefix: Sequence[bytes]) -> ChunkKv:
    """The one of a chunk's stored versions that needs least repair behind these chunks."""
    return min(versions, key=lambda chunk: overhead(chunk.context, prefix))


@dataclass(frozen=True, slots=True)
class CacheCraft:
    """See the module. Chunks that the question pays less than `focus` of its fair share of attention are left alone."""

    scale: float = _SCALE
    focus: float = 0.0
    layer: int = 1

    @property
    def checks(self) -> tuple[int, ...]:
        """See `Selector`."""
        return (self.layer,) if self.focus else ()

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        chosen = torch.zeros_like(prompt.reused)
        prefix: list[bytes] = []
        for piece in prompt.placed:
            context = piece.chunk.context
            count = math.ceil(overhead(context, prefix, self.scale) * piece.count)
            part = slice(piece.start, piece.stop)
            outside = torch.zeros(piece.count) if context is None else context.outside[piece.offset :][: piece.count]
            chosen[part] = best(outside, prompt.reused[part], count)
            prefix.append(piece.name)
        return chosen

    def narrow(self, layer: int, look: Look) -> Tensor:
        """See `Selector`."""
        attention = look.attention(look.asking).sum((0, 1))
        kept = torch.ones(len(attention), dtype=torch.bool, device=attention.device)
        fair = attention.sum() / len(kept) * self.focus
        for piece in look.prompt.placed:
            if attention[piece.start : piece.stop].mean() < fair:
                kept[piece.start : piece.stop] = False
        return kept[look.positions]


def _disorder(old: Sequence[bytes], new: Sequence[bytes]) -> float:
    """Kendall's tau distance of the order of `old` from that in `new`, from 0 to 1."""
    places = [new.index(name) for name in old]
    pairs = list(combinations(places, 2))
    return sum(first > second for first, second in pairs) / len(pairs) if pairs else 0.0
