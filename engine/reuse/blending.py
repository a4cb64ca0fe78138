"""Prompts whose chunks are there, computed only where it matters.

A selector names the reused tokens that are computed all the same. It may name them before anything is computed, or at
*check layers*: up to there all of its candidates are computed, and at each of them some are dropped, having seen how
far their fresh keys and values are from those held. Tokens see all before them, computed or held, and none after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.attention import LayerPool, Packed
from engine.model import Turned
from engine.reuse.chunks import BlendPrompt
from engine.sequence import Positions, by_worth


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What a selector sees at a check layer, of the M tokens that are computed there.

    Of a prompt that is computed piece by piece these are the tokens of one piece, and N ends with it.
    """

    prompt: BlendPrompt
    count: int
    """Reused tokens, of which ratios are a share: of the prompt, or of its piece."""
    positions: Tensor
    """int64 [M]."""
    queries: Tensor
    """[M, H, D]."""
    keys: Tensor
    """[M, K, D], as are the values: fresh, in this context."""
    values: Tensor
    held_keys: Tensor
    """[M, K, D], as are the values: as the chunks brought them, turned."""
    held_values: Tensor
    all_keys: Tensor
    """[N, K, D]: of the prompt so far, in this layer, as they are now."""

    def attention(self, rows: Tensor) -> Tensor:
        """float32 [H, R, N]: what the tokens that `rows`, bool [M], names attend to."""
        queries = self.queries[rows].float()
        keys = self.all_keys.float().repeat_interleave(queries.shape[1] // self.all_keys.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / queries.shape[-1] ** 0.5
        future = torch.arange(len(keys), device=keys.device) > self.positions[rows][:, None]
        weights: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1)
        return weights

    @property
    def reused(self) -> Tensor:
        """bool [M]: tokens that may be dropped."""
        reused, positions = self.prompt.reused.to(self.positions.device), self.positions
        # A prompt computed once more may have drawn tokens behind it.
        return (positions < len(reused)) & reused[positions.clamp(max=len(reused) - 1)]

    @property
    def asking(self) -> Tensor:
        """bool [M]: those whose attention says what matters: what is not reused, or all where a piece has no such."""
        own = ~self.reused
        return own if bool(own.any()) else ~own


class Selector(Protocol):
    """Which reused tokens are computed all the same. Holds no state of a prompt."""

    @property
    def checks(self) -> tuple[int, ...]:
        """Layers at which `narrow` is asked, ascending; none: `choose` says all."""
        ...

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """bool [N]: those to begin with. What is not reused is computed whatever this says."""
        ...

    def narrow(self, layer: int, look: Look) -> Tensor:
        """bool [M]: those to go on with, of the tokens computed so far."""
        ...

    def missed(self, look: Look) -> Tensor | None:
        """float32 [M]: what it costs that a token is dropped here; None: that is not known.

        In which order they are repaired beside the tokens drawn; asked only where they are.
        """
        ...


class Blend:
    """One prompt on its way through the layers; see `engine.model.Narrowing`."""

    def __init__(self, prompt: BlendPrompt, selector: Selector, last: int = 1, *, ranked: bool = False) -> None:
        """The `last` tokens are always computed: their scores are wanted. `ranked`: so is `repairs`."""
        self._prompt, self._selector = prompt, selector
        needed = ~prompt.reused
        needed[len(needed) - last :] = True
        self._needed = needed
        self.rows = (needed | selector.choose(prompt)).nonzero()[:, 0]
        """int64: positions computed in the first layer."""
        self._checks = frozenset(selector.checks)
        self.positions: list[Tensor] = []
        """int64: of the tokens computed in each layer so far."""
        self._missed = torch.full((len(prompt.tokens),), -torch.inf) if ranked else None

    @property
    def computed(self) -> list[int]:
        """Tokens computed in each layer so far."""
        return [len(positions) for positions in self.positions]

    @property
    def repairs(self) -> Positions:
        """Tokens that were not computed in all layers, those that are missed most first."""
        left = self._prompt.reused.clone()
        left[self.positions[-1].cpu()] = False
        return by_worth(left.nonzero()[:, 0].numpy(), None if self._missed is None else self._missed.numpy())

    def before(self, layer: int, memory: LayerPool, packed: Packed) -> tuple[Tensor, Tensor] | None:
        """See `Narrowing`."""
        self.positions.append(packed.positions)
        return memory.read(packed.slots) if layer in self._checks else None

    def narrow(self, layer: int, turned: Turned) -> tuple[Tensor, Packed] | None:
        """See `Narrowing`."""
        packed = turned.packed
        look = look_at(self._prompt, int(self._prompt.reused.sum()), turned, 0, slice(None))
        kept = self._selector.narrow(layer, look) | self._needed.to(packed.positions.device)[packed.positions]
        if self._missed is not None and (missed := self._selector.missed(look)) is not None:
            self._missed[packed.positions[~kept]] = missed[~kept].cpu()
        rows = kept.nonzero()[:, 0]
        self.positions[-1] = packed.positions[rows]
        return rows, packed.narrowed(rows, (len(rows),), (int(packed.positions[rows[0]]),))


def look_at(prompt: BlendPrompt, count: int, turned: Turned, index: int, rows: slice) -> Look:
    """What there is to see of sequence `index` of a step, which has these rows; `count` see `Look`."""
    packed, keys = turned.packed, turned.memory.keys
    return Look(
        prompt,
        count,
        packed.positions[rows],
        turned.queries[rows],
        turned.keys[rows],
        turned.values[rows],
        turned.held[0][rows],
        turned.held[1][rows],
        keys[packed.tables[index].long()].flatten(0, 1)[: packed.totals[index]],
    )


def best(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """bool, as `allowed`: the `count` allowed ones with the highest scores, the first of equals."""
    chosen = torch.zeros_like(allowed)
    count = min(count, int(allowed.sum()))
    ranked = scores.float().masked_fill(~allowed, -torch.inf)
    chosen[ranked.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def share(ratio: float, count: int) -> int:
    """So many of `count` tokens; one at least where any are wanted."""
    return min(count, max(1, round(ratio * count))) if ratio > 0 else 0
