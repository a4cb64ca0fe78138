"""One model under measurement: divergences of all methods on a prompt, and what each method costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.checkpoint import Checkpoint
from engine.reuse.blending import Blend
from engine.reuse.cachecraft import Observer, in_order
from engine.reuse.chunks import ChunkKv
from engine.reuse.known import name_of
from engine.reuse.sensitivity import averaged, measured
from engine.reuse.trial import Trial, operations
from loadtest.quality.methods import Case, Method, Stored
from loadtest.quality.statistics import divergence
from loadtest.quality.tasks import SUFFIX, Prompt

Text = tuple[int, ...]
FOREIGN = 2
"""Texts that a case needs to put before its chunks."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a method takes, relative to computing everything."""

    computed: float
    """Share of the prompt's tokens, mean over layers."""
    operations: float
    seconds: float


class Bench:
    """One model, and room to compute in."""

    def __init__(self, checkpoint: Checkpoint, capacity: int) -> None:
        self.checkpoint = checkpoint
        self.trial, self._store = Trial(checkpoint, capacity), Trial(checkpoint, capacity)

    def case(self, prompt: Prompt, foreign: Sequence[Text], rng: np.random.Generator) -> Case:
        """`foreign`: `FOREIGN` texts that do not stand in the prompt."""
        exact = self.trial.compute(prompt.tokens, SUFFIX + 1)[:-1]
        true, start = [], len(prompt.head)
        for chunk in prompt.chunks:
            true.append(self.trial.taken(prompt.tokens, start, start + len(chunk)))
            start += len(chunk)
        stored = self._stored(prompt, foreign)
        stored["seen"] = self._seen(_earlier(prompt, foreign, rng), prompt)
        return Case(prompt, exact, stored, tuple(true))

    def divergence(self, case: Case, method: Method) -> float:
        """KL from the exact scores."""
        prompt = case.blended(method.stored)
        scores = self.trial.blend(prompt, method.selector(case), SUFFIX + 1, turned=method.turned)
        return divergence(case.exact, scores[:-1])

    def _stored(self, prompt: Prompt, foreign: Sequence[Text]) -> dict[Stored, tuple[ChunkKv, ...]]:
        found: dict[Stored, list[ChunkKv]] = {"alone": [], "head": [], "mean": []}
        for chunk in prompt.chunks:
            elsewhere = [self._store.chunk(chunk, after=(*prompt.head, *text)) for text in foreign]
            head = self._store.chunk(chunk, after=prompt.head)
            found["alone"].append(measured(self._store.chunk(chunk), elsewhere))
            found["head"].append(measured(head, elsewhere))
            found["mean"].append(averaged(elsewhere))
        return {stored: tuple(chunks) for stored, chunks in found.items()}

    def _seen(self, earlier: Prompt, prompt: Prompt) -> tuple[ChunkKv, ...]:
        starts = np.cumsum([len(earlier.head), *map(len, earlier.chunks)]).tolist()
        texts = in_order(earlier.tokens, zip(starts, map(name_of, earlier.chunks), strict=False))
        observer = Observer(texts, len(earlier.tokens), self.checkpoint.config.windows)
        self._store.compute(earlier.tokens, 1, observer)
        found = {}
        for start, chunk in zip(starts, earlier.chunks, strict=False):
            stop = start + len(chunk)
            found[chunk] = self._store.taken(earlier.tokens, start, stop, observer.context(start, stop))
        return tuple(found[chunk] for chunk in prompt.chunks)


def _earlier(prompt: Prompt, foreign: Sequence[Text], rng: np.random.Generator) -> Prompt:
    """The same chunks in another order, with one foreign chunk among them, as an earlier question brought them."""
    chunks = [*prompt.chunks, foreign[0]]
    return Prompt(prompt.head, tuple(chunks[i] for i in rng.permutation(len(chunks))), prompt.suffix)


def timed(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest: others use this machine too."""
    run()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def costs(bench: Bench, case: Case, chosen: Sequence[Method], rounds: int) -> dict[Method, Cost]:
    """What each method costs on one prompt, placing its chunks included."""
    trial, config, prompt = bench.trial, bench.checkpoint.config, case.prompt
    total = len(prompt.tokens)
    whole = operations(config, [torch.arange(total)] * config.layers)
    full = timed(lambda: trial.compute(prompt.tokens, 1), rounds)
    found = {}
    for method in chosen:
        placed, selector = case.blended(method.stored), method.selector(case)
        blend = Blend(placed, selector)
        trial.run(placed, blend)
        seconds = timed(lambda p=placed, s=selector: trial.blend(p, s, 1), rounds)  # type: ignore[misc]
        tokens = sum(blend.computed) / (total * config.layers)
        found[method] = Cost(tokens, operations(config, blend.positions) / whole, seconds / full)
    return found
