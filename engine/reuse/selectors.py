"""The published rules for what to compute again, the two ends, and chance. Each is a few lines over one protocol.

`ratio` is always the share of the reused tokens that is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.reuse.blending import Look, best, share
from engine.reuse.chunks import BlendPrompt

Deviation = Literal["k", "v", "kv"]


class Chosen:
    """Base of those that know before anything is computed."""

    @property
    def checks(self) -> tuple[int, ...]:
        """See `Selector`."""
        return ()

    def narrow(self, layer: int, look: Look) -> Tensor:
        """Drops none."""
        return torch.ones(len(look.positions), dtype=torch.bool, device=look.positions.device)

    def missed(self, look: Look) -> Tensor | None:
        """Not known."""
        return None


@dataclass(frozen=True, slots=True)
class Full(Chosen):
    """Everything: the same as no reuse."""

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        return torch.ones_like(prompt.reused)


@dataclass(frozen=True, slots=True)
class Nothing(Chosen):
    """Chunks as they are."""

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        return torch.zeros_like(prompt.reused)


@dataclass(frozen=True, slots=True)
class Random(Chosen):
    """Any, the same for the same prompt: what a rule must beat."""

    ratio: float
    seed: int = 0

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        generator = torch.Generator().manual_seed(hash((self.seed, *prompt.tokens)) & 0x7FFFFFFF)
        scores = torch.rand(len(prompt.tokens), generator=generator)
        return best(scores, prompt.reused, share(self.ratio, int(prompt.reused.sum())))


@dataclass(frozen=True, slots=True)
class Epic(Chosen):
    """The first tokens of each chunk (EPIC, arXiv 2410.15332): alone they were sinks, here they are not."""

    ratio: float

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        chosen = torch.zeros_like(prompt.reused)
        for piece in prompt.placed:
            if not piece.exact:
                chosen[piece.start : piece.start + share(self.ratio, piece.count)] = True
        return chosen


@dataclass(frozen=True, slots=True)
class CacheBlend:
    """Those whose keys or values deviate most at the check layer (CacheBlend, arXiv 2405.16444).

    With several `stages`, (layer, ratio) with falling ratios, the paper's gradual filtering.
    """

    stages: tuple[tuple[int, float], ...]
    score: Deviation = "kv"

    @property
    def checks(self) -> tuple[int, ...]:
        """See `Selector`."""
        return tuple(layer for layer, _ in self.stages)

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        return torch.ones_like(prompt.reused)

    def narrow(self, layer: int, look: Look) -> Tensor:
        """See `Selector`."""
        return best(deviation(look, self.score), look.reused, share(dict(self.stages)[layer], look.count))

    def missed(self, look: Look) -> Tensor | None:
        """See `Selector`."""
        return deviation(look, self.score)


@dataclass(frozen=True, slots=True)
class KvShare:
    """Deviations weighted by the attention that the prompt's own tokens pay them (after KVShare, arXiv 2503.16525).

    Its formula is not public: this is the change of the attention output to first order, Σ a·(|ΔV| + |V|·|q·ΔK|/√D),
    over the queries of tokens that are not reused (all, in a piece of a prompt without any), at the check layer.
    """

    ratio: float
    layer: int = 1

    @property
    def checks(self) -> tuple[int, ...]:
        """See `Selector`."""
        return (self.layer,)

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        return torch.ones_like(prompt.reused)

    def narrow(self, layer: int, look: Look) -> Tensor:
        """See `Selector`."""
        return best(influence(look), look.reused, share(self.ratio, look.count))

    def missed(self, look: Look) -> Tensor | None:
        """See `Selector`. A mean over the tokens that ask: pieces have more of them and fewer."""
        return influence(look) / int(look.asking.sum())


def deviation(look: Look, score: Deviation) -> Tensor:
    """float32 [M]: squared distance of fresh keys or values from those held, summed over heads."""
    total = torch.zeros(len(look.positions), device=look.positions.device)
    for wanted, fresh, held in (("k", look.keys, look.held_keys), ("v", look.values, look.held_values)):
        if wanted in score:
            total += (fresh.float() - held.float()).square().sum((1, 2))
    return total


def influence(look: Look) -> Tensor:
    """float32 [M]: how much the attention output of the tokens that ask hangs on each token's deviation."""
    asking = look.asking
    group = look.queries.shape[1] // look.keys.shape[1]
    queries = look.queries[asking].float()
    values, turns, moves = (
        part.float().repeat_interleave(group, dim=1)
        for part in (look.values, look.keys - look.held_keys, look.values - look.held_values)
    )
    weights = look.attention(asking)[:, :, look.positions]
    change = torch.einsum("qhd,khd->hqk", queries, turns).abs() / queries.shape[-1] ** 0.5
    moved, size = (part.norm(dim=-1).T[:, None] for part in (moves, values))
    total: Tensor = (weights * (moved + size * change)).sum((0, 1))
    return total
