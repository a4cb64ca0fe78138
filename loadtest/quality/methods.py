"""What is compared: selectors, ratios, where chunks were computed, and whether their keys are turned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from engine.reuse.blending import Selector, best, share
from engine.reuse.cachecraft import CacheCraft, in_order
from engine.reuse.chunks import BlendPrompt, ChunkKv, Placed
from engine.reuse.known import name_of
from engine.reuse.selectors import CacheBlend, Chosen, Epic, Full, KvShare, Nothing, Random
from engine.reuse.sensitivity import Early, Sensitive, deviation_of
from loadtest.quality.tasks import Prompt

RATIOS = (0.05, 0.15, 0.30)
_EARLY = (0.0, 0.05, 0.15)
_CRAFT = (0.25, 0.5, 1.0)
Stored = Literal["alone", "head", "seen", "mean"]
"""Where a chunk was computed: from position 0 on; behind the head that all prompts have; in an earlier prompt; behind
the head and one or another text, of which the mean is kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One prompt, its exact scores, and its chunks as stored in each way."""

    prompt: Prompt
    exact: Tensor
    stored: dict[Stored, tuple[ChunkKv, ...]]
    true: tuple[ChunkKv, ...]
    """The chunks as they are in this very prompt; only the oracle knows."""

    def blended(self, stored: Stored) -> BlendPrompt:
        """The prompt with its chunks placed."""
        start, placed = len(self.prompt.head), []
        for chunk in self.stored[stored]:
            placed.append(Placed(chunk, start, 0, len(chunk.tokens), name=name_of(chunk.tokens)))
            start += len(chunk.tokens)
        texts = in_order(self.prompt.tokens, ((piece.start, piece.name) for piece in placed))
        return BlendPrompt(self.prompt.tokens, tuple(placed), texts)


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table."""

    name: str
    ratio: float
    selector: Callable[[Case], Selector]
    stored: Stored = "alone"
    turned: bool = True

    def measured_on(self, task: str) -> bool:
        """Keys that are not turned are wrong whatever the task: one task shows that."""
        return self.turned or not self.ratio or task == "quote"

    @property
    def label(self) -> str:
        """Names it in files."""
        return f"{self.name}|{self.stored}|{self.ratio:.2f}|{'turned' if self.turned else 'not turned'}"


@dataclass(frozen=True, slots=True)
class _Ranked(Chosen):
    """The oracle: tokens by their true deviation, which costs a full prefill to know."""

    scores: Tensor
    ratio: float

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        return best(self.scores, prompt.reused, share(self.ratio, int(prompt.reused.sum())))


def methods() -> list[Method]:
    """All of them; the first is what the others are relative to: chunks stored alone, keys turned."""
    rows = [_method("none", 0.0, Nothing()), _method("none", 0.0, Nothing(), turned=False)]
    rows += [_method("none", 0.0, Nothing(), stored) for stored in ("head", "seen", "mean")]
    rows.append(_method("full", 1.0, Full()))
    for ratio in RATIOS:
        for name, selector in _published(ratio).items():
            rows.append(_method(name, ratio, selector))
            if name not in ("cacheblend K", "cacheblend V"):
                rows.append(_method(name, ratio, selector, turned=False))
        rows += [_method(name, ratio, _published(ratio)[name], "mean") for name in ("epic", "cacheblend K+V")]
        rows.append(Method("oracle", ratio, partial(_oracle, ratio=ratio)))
    rows += [_method("sensitive", ratio, Sensitive(ratio), "alone", turned=turned) for ratio, turned in _turned()]
    rows += [_method("sensitive", ratio, Sensitive(ratio), "head") for ratio in RATIOS]
    rows += [_method("sensitive", ratio, Sensitive(ratio), "mean") for ratio in RATIOS]
    rows += [_method("early", ratio, Early(ratio), stored) for stored in ("head", "mean") for ratio in _EARLY]
    rows += [_method("cachecraft", scale, CacheCraft(scale), "seen") for scale in _CRAFT]
    rows += [_method("cachecraft", scale, CacheCraft(scale), "seen", turned=False) for scale in _CRAFT]
    return rows


def _published(ratio: float) -> dict[str, Selector]:
    gradual = ((1, min(1.0, 1.3 * ratio)), (2, ratio), (3, 0.7 * ratio))
    return {
        "random": Random(ratio),
        "epic": Epic(ratio),
        "cacheblend K": CacheBlend(((1, ratio),), "k"),
        "cacheblend V": CacheBlend(((1, ratio),), "v"),
        "cacheblend K+V": CacheBlend(((1, ratio),)),
        "cacheblend gradual": CacheBlend(gradual),
        "kvshare": KvShare(ratio),
    }


def _turned() -> Iterator[tuple[float, bool]]:
    return ((ratio, turned) for ratio in RATIOS for turned in (True, False))


def _method(name: str, ratio: float, selector: Selector, stored: Stored = "alone", *, turned: bool = True) -> Method:
    return Method(name, ratio, lambda case: selector, stored, turned)


def _oracle(case: Case, ratio: float) -> Selector:
    prompt = case.blended("alone")
    scores = torch.zeros(len(prompt.tokens))
    for piece, true in zip(prompt.placed, case.true, strict=True):
        scores[piece.start : piece.stop] = deviation_of(piece.chunk, true)
    return _Ranked(scores, ratio)
