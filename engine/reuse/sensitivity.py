"""Hitpath's own rule: which tokens of a chunk hang on what stands before them is measured once, when there is time.

CacheBlend finds out anew in every prompt, at the price of computing everything up to its check layer, and sees only
that layer's deviations. But mostly it is the same tokens whatever stands before. So a stored chunk is computed once
more behind texts of others, the deviations of *all* layers are added up, and with every prompt the tokens that moved
most are computed again, from the first layer on and without looking.

What is measured for that is good for more. Of the same chunk behind several texts, the mean of its keys and values is
nearer to what it will be behind the next ones than any of them, and nearer by far than the chunk alone, whose first
tokens are sinks. So the mean is what is kept, and it costs nothing when a prompt comes. The chunk behind nothing but
the head is not among them: what stands right behind a prompt's first tokens is too unlike what stands further on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.reuse.blending import Look, best, share
from engine.reuse.chunks import BlendPrompt, ChunkKv
from engine.reuse.selectors import Chosen


def deviation_of(one: ChunkKv, other: ChunkKv) -> Tensor:
    """float32 [T]: squared distance of keys and values of the same tokens, summed over layers and heads."""
    if one.tokens != other.tokens:
        raise ValueError("only the same tokens can be compared")
    pairs = zip(one.layers, other.layers, strict=True)
    return torch.stack([(a.float() - b.float()).square().sum((0, 2, 3)) for a, b in pairs]).sum(0)


def measured(chunk: ChunkKv, elsewhere: Sequence[ChunkKv]) -> ChunkKv:
    """The chunk with its tokens' sensitivity; `elsewhere`: the same chunk computed behind other texts, one or more."""
    return replace(chunk, sensitivity=torch.stack([deviation_of(chunk, other) for other in elsewhere]).mean(0))


def averaged(versions: Sequence[ChunkKv]) -> ChunkKv:
    """The mean of one chunk computed behind several texts, two or more, with its tokens' sensitivity.

    Where rotary angles depend on the length, all of these texts must have the same one. Raises ValueError for one
    version, or other tokens.
    """
    if len(versions) < 2:
        raise ValueError("a mean needs a chunk behind two texts at least")
    layers = tuple(
        torch.stack([layer.float() for layer in same]).mean(0).to(same[0].dtype)
        for same in zip(*(version.layers for version in versions), strict=True)
    )
    middle = replace(versions[0], layers=layers, before=max(version.before for version in versions), context=None)
    return measured(middle, versions)


@dataclass(frozen=True, slots=True)
class Sensitive(Chosen):
    """The most sensitive tokens of all chunks together, so that each chunk gets what it needs.

    Of a chunk that was not measured yet, its first tokens count as the most sensitive ones, as EPIC has it.
    """

    ratio: float

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        chosen = torch.zeros_like(prompt.reused)
        scores = torch.zeros(len(prompt.tokens))
        for piece in prompt.placed:
            if piece.exact:
                continue
            if piece.chunk.sensitivity is not None:
                scores[piece.start : piece.stop] = piece.chunk.sensitivity[piece.offset :][: piece.count]
            else:
                chosen[piece.start : piece.start + share(self.ratio, piece.count)] = True
        known = prompt.reused & (scores > 0)
        return chosen | best(scores, known, share(self.ratio, int(prompt.reused.sum())) - int(chosen.sum()))


@dataclass(frozen=True, slots=True)
class Early:
    """Everything up to the keys and values of an early layer, and beyond it the most sensitive tokens; with 0, none.

    What a model copies by is often in its first two layers: there a small deviation of every token spoils the match,
    and no choice of tokens mends that. In a deep model those layers are a small part of the work.
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
        if not self.ratio:
            return torch.zeros_like(look.reused)
        return Sensitive(self.ratio).choose(look.prompt).to(look.positions.device)[look.positions]

    def missed(self, look: Look) -> Tensor | None:
        """Not known: sensitivities are of all layers, and up to here nothing is missed."""
        return None
