"""Cache-Craft's rule (arXiv 2502.15734): chunks kept as first prompts computed them, and their repair.

Where a chunk is computed in a prompt, its context index says how much its tokens attended to each text before
it. Placed behind others, the more of that attention is lost, the more of its tokens are computed again: those first
that had attended most to what stood before. Of several versions of a chunk, from several prompts, the one is placed
that loses least.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from engine.attention import LayerPool, Packed
from engine.model import Turned
from engine.reuse.blending import Look, best
from engine.reuse.chunks import BlendPrompt, ContextIndex, names_before
from engine.reuse.known import name_of

_SCALE = 1.0
"""The paper's α where nobody calibrated another."""


FAMILIAR = 0.5
"""β′ of the best version below which the chunk as it is in this prompt is worth keeping as one more."""


def in_order(tokens: Sequence[int], texts: Iterable[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """See `BlendPrompt.texts`: where texts of a prompt begin and their names, sorted, behind what it begins with."""
    found = dict(sorted(texts))
    return ((0, name_of(tokens[: min(found, default=len(tokens))])), *found.items())


class Observer:
    """Sums up attention by text while a prompt is computed, whole or piece by piece; a `Narrowing` that drops nothing.

    What stands between two texts counts as part of the one before.
    """

    def __init__(self, texts: Sequence[tuple[int, bytes]], length: int, windows: Sequence[int | None]) -> None:
        """`texts`: see `in_order`; `length`: of the prompt; `windows`: see `ModelConfig`, one a layer."""
        self._starts, self._names = [start for start, _ in texts], [name for _, name in texts]
        self._segment = torch.searchsorted(torch.tensor(self._starts), torch.arange(length), right=True) - 1
        self._windows = tuple(windows)
        self._mass = torch.zeros(length, len(texts))

    @property
    def mass(self) -> Tensor:
        """float32 [N, S]: attention of each token on each text, mean over layers and heads; rows sum to 1."""
        return self._mass / len(self._windows)

    def before(self, layer: int, memory: LayerPool, packed: Packed) -> tuple[Tensor, Tensor] | None:
        """See `Narrowing`."""
        return memory.keys[:0], memory.values[:0]  # nothing held is looked at

    def narrow(self, layer: int, turned: Turned) -> tuple[Tensor, Packed] | None:
        """See `Narrowing`. One key/value head at a time: never more than [H / K, M, N] weights of M new tokens."""
        packed, window = turned.packed, self._windows[layer]
        keys = turned.memory.keys[packed.tables[0].long()].flatten(0, 1)[: packed.totals[0]].float()
        back = packed.positions[:, None] - torch.arange(len(keys), device=keys.device)
        unseen = (back < 0) if window is None else (back < 0) | (back >= window)
        segment = self._segment[: len(keys)].to(keys.device)
        mass = torch.zeros(len(back), self._mass.shape[1], device=keys.device)
        for head, queries in enumerate(turned.queries.float().chunk(keys.shape[1], dim=1)):
            scores = torch.einsum("qgd,kd->gqk", queries, keys[:, head]) / math.sqrt(queries.shape[-1])
            mass.index_add_(1, segment, scores.masked_fill_(unseen, -torch.inf).softmax(-1).sum(0))
        self._mass[packed.positions.cpu()] += mass.cpu() / turned.queries.shape[1]
        return None

    def context(self, start: int, stop: int) -> ContextIndex:
        """The context index of tokens `start` to `stop`, with which one of the texts begins."""
        which, size = bisect_right(self._starts, start) - 1, stop - start
        rows = self.mass[start:stop]
        inter, intra = rows[:, :which].sum(0), float(rows[:, which].sum())
        before = float(inter.sum()) / (size * max(1, start))
        within = intra / (size * size)
        impact = 1 / (1 + math.exp(-before / within)) if within else 1.0
        return ContextIndex(tuple(self._names[:which]), tuple(inter.tolist()), rows[:, :which].sum(1), impact)


def overlap(context: ContextIndex, prefix: Sequence[bytes]) -> float:
    """β′: share of the chunk's attention on others that stands before it again, less what their order differs.

    What prompts begin with does not count, unless it is another: attention rests there in any context.
    """
    (head, *old), (resting, *inter), (now, *new) = context.prefix, context.inter, prefix or (b"",)
    total = sum(inter) + resting * (head != now)
    if not total:
        return float(old == new)
    places = _again(old, new)
    kept = sum(mass for place, mass in zip(places, inter, strict=True) if place is not None)
    return kept / total * (1 - _disorder([place for place in places if place is not None]))


def overhead(context: ContextIndex | None, prefix: Sequence[bytes], scale: float = _SCALE) -> float:
    """CFO: share of the chunk's tokens to compute again, in [0, 1]. Without an index nothing is known: half of it."""
    if context is None:
        return min(1.0, scale / 2)
    return min(1.0, scale * context.impact * (1 - overlap(context, prefix)))


def unfit(context: ContextIndex | None, prefix: Sequence[bytes]) -> tuple[bool, float]:
    """Sorts a chunk's versions: the least is that which needs least repair behind these texts."""
    return context is None, overhead(context, prefix)


def familiar(context: ContextIndex | None, prefix: Sequence[bytes]) -> bool:
    """Whether a version from that context is near enough to what the chunk would be behind these texts."""
    return context is not None and overlap(context, prefix) >= FAMILIAR


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
        for piece in prompt.placed:
            context = piece.chunk.context
            count = math.ceil(overhead(context, names_before(prompt.texts, piece.start), self.scale) * piece.count)
            part = slice(piece.start, piece.stop)
            outside = torch.zeros(piece.count) if context is None else context.outside[piece.offset :][: piece.count]
            chosen[part] = best(outside, prompt.reused[part], count)
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

    def missed(self, look: Look) -> Tensor | None:
        """Not known: whole chunks are dropped here."""
        return None


def _again(old: Sequence[bytes], new: Sequence[bytes]) -> list[int | None]:
    """Where each of `old` stands in `new`, the second of equals where the second stands; None: not there."""
    places: dict[bytes, list[int]] = {}
    for place, name in reversed(list(enumerate(new))):
        places.setdefault(name, []).append(place)
    return [left.pop() if (left := places.get(name)) else None for name in old]


def _disorder(places: Sequence[int]) -> float:
    """Kendall's tau distance of places from their order, from 0 to 1."""
    pairs = list(combinations(places, 2))
    return sum(first > second for first, second in pairs) / len(pairs) if pairs else 0.0
