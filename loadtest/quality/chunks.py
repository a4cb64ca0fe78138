"""What reusing chunks costs: `python -m loadtest.quality.chunks --out DIR [--model DIR]`.

For every task and prompt: full prefill, and every method on the same stored chunks. Reported is KL(full ‖ method) over
the ending, relative to using chunks as they are, beside measured time, operations and the share of tokens computed.
"""

from __future__ import annotations

import argparse
import statistics as plain
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.config import ModelConfig
from engine.reuse.blending import Blend, Selector, best, share
from engine.reuse.cachecraft import CacheCraft, Observer, context_index
from engine.reuse.chunks import BlendPrompt, ChunkKv, Placed
from engine.reuse.selectors import CacheBlend, Chosen, Epic, Full, KvShare, Nothing, Random
from engine.reuse.sensitivity import Sensitive, deviation_of, measured
from engine.reuse.trial import Trial
from loadtest.data import data_dir
from loadtest.quality.report import Row, save, table
from loadtest.quality.statistics import divergence, relative
from loadtest.quality.tasks import SUFFIX, Prompt, Tasks
from loadtest.training.samples import held_out

TASKS = ("quote", "facts", "continuation")
RATIOS = (0.05, 0.15, 0.30)
Stored = Literal["alone", "behind", "prompt"]
"""Where a chunk was computed: from position 0 on; behind the head that all prompts have; in an earlier prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One prompt, its exact scores, and its chunks as stored in each way."""

    prompt: Prompt
    exact: Tensor
    stored: dict[Stored, tuple[ChunkKv, ...]]
    true: tuple[ChunkKv, ...]
    """The chunks as they are in this very prompt; only the oracle knows."""


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table."""

    name: str
    ratio: float
    selector: Callable[[Case], Selector]
    stored: Stored = "alone"
    turned: bool = True


@dataclass(frozen=True, slots=True)
class Ranked(Chosen):
    """The oracle: tokens by their true deviation, which costs a full prefill to know."""

    scores: Tensor
    ratio: float

    def choose(self, prompt: BlendPrompt) -> Tensor:
        """See `Selector`."""
        return best(self.scores, prompt.reused, share(self.ratio, int(prompt.reused.sum())))


def methods() -> list[Method]:
    """All that is compared."""

    def fixed(selector: Selector) -> Callable[[Case], Selector]:
        return lambda case: selector

    rows = [
        Method("none", 0.0, fixed(Nothing())),
        Method("none, K not turned", 0.0, fixed(Nothing()), turned=False),
        Method("none", 0.0, fixed(Nothing()), "behind"),
        Method("full", 1.0, fixed(Full())),
    ]
    for ratio in RATIOS:
        gradual = ((1, min(1.0, 1.3 * ratio)), (2, ratio), (3, 0.7 * ratio))
        for name, selector in (
            ("random", Random(ratio)),
            ("epic", Epic(ratio)),
            ("cacheblend K", CacheBlend(((1, ratio),), "k")),
            ("cacheblend V", CacheBlend(((1, ratio),), "v")),
            ("cacheblend K+V", CacheBlend(((1, ratio),))),
            ("cacheblend gradual", CacheBlend(gradual)),
            ("kvshare", KvShare(ratio)),
        ):
            rows.append(Method(name, ratio, fixed(selector)))
        rows += [
            Method("epic, K not turned", ratio, fixed(Epic(ratio)), turned=False),
            Method("cacheblend K+V, K not turned", ratio, fixed(CacheBlend(((1, ratio),))), turned=False),
            Method("epic", ratio, fixed(Epic(ratio)), "behind"),
            Method("cacheblend K+V", ratio, fixed(CacheBlend(((1, ratio),))), "behind"),
            Method("sensitive", ratio, fixed(Sensitive(ratio)), "alone"),
            Method("sensitive", ratio, fixed(Sensitive(ratio)), "behind"),
            Method("oracle", ratio, lambda case, r=ratio: _oracle(case, "alone", r)),  # type: ignore[misc]
            Method("oracle", ratio, lambda case, r=ratio: _oracle(case, "behind", r), "behind"),  # type: ignore[misc]
        ]
    rows += [Method("cachecraft", scale, fixed(CacheCraft(scale)), "prompt") for scale in (0.25, 0.5, 1.0)]
    return rows


def _oracle(case: Case, stored: Stored, ratio: float) -> Selector:
    prompt = blended(case, stored)
    scores = torch.zeros(len(prompt.tokens))
    for piece, true in zip(prompt.placed, case.true, strict=True):
        scores[piece.start : piece.stop] = deviation_of(piece.chunk, true)
    return Ranked(scores, ratio)


def blended(case: Case, stored: Stored) -> BlendPrompt:
    """The prompt with its chunks placed."""
    start, placed = len(case.prompt.head), []
    for chunk in case.stored[stored]:
        placed.append(Placed(chunk, start, 0, len(chunk.tokens), name=_name(chunk.tokens)))
        start += len(chunk.tokens)
    return BlendPrompt(case.prompt.tokens, tuple(placed))


class Bench:
    """One model, and room to compute in."""

    def __init__(self, checkpoint: Checkpoint, capacity: int) -> None:
        self.checkpoint = checkpoint
        self.trial, self._store = Trial(checkpoint, capacity), Trial(checkpoint, capacity)

    def case(self, prompt: Prompt, earlier: Prompt, others: Iterable[tuple[int, ...]]) -> Case:
        """`earlier`: a prompt that had the same chunks among others. `others`: texts that may stand before a chunk."""
        exact = self.trial.compute(prompt.tokens, SUFFIX + 1)[:-1]
        true, start = [], len(prompt.head)
        for chunk in prompt.chunks:
            true.append(self.trial.taken(prompt.tokens, start, start + len(chunk)))
            start += len(chunk)
        contexts = [[*prompt.head, *text] for text in others]
        alone, behind = [], []
        for chunk in prompt.chunks:
            elsewhere = [self._store.chunk(chunk, after=context) for context in contexts]
            alone.append(measured(self._store.chunk(chunk), elsewhere))
            behind.append(measured(self._store.chunk(chunk, after=prompt.head), elsewhere))
        stored: dict[Stored, tuple[ChunkKv, ...]] = {"alone": tuple(alone), "behind": tuple(behind)}
        stored["prompt"] = self._from_prompt(earlier, prompt)
        return Case(prompt, exact, stored, tuple(true))

    def divergence(self, case: Case, method: Method) -> float:
        """KL from the exact scores."""
        prompt = blended(case, method.stored)
        scores = self.trial.blend(prompt, method.selector(case), SUFFIX + 1, turned=method.turned)
        return divergence(case.exact, scores[:-1])

    def _from_prompt(self, earlier: Prompt, prompt: Prompt) -> tuple[ChunkKv, ...]:
        ends = np.cumsum([len(earlier.head), *map(len, earlier.chunks), len(earlier.suffix)]).tolist()
        names = [b"head", *map(_name, earlier.chunks), b"suffix"]
        observer = Observer(ends)
        self._store.compute(earlier.tokens, 1, observer)
        found = {}
        for which, chunk in enumerate(earlier.chunks, start=1):
            context = context_index(observer.mass, names, ends, which)
            found[chunk] = self._store.taken(earlier.tokens, ends[which - 1], ends[which], context)
        return tuple(found[chunk] for chunk in prompt.chunks)


def _name(tokens: Iterable[int]) -> bytes:
    return np.asarray(tuple(tokens), dtype=np.int32).tobytes()


def earlier_prompt(prompt: Prompt, others: list[tuple[int, ...]], rng: np.random.Generator) -> Prompt:
    """The same chunks in another order, with one foreign chunk among them, as an earlier question brought them."""
    chunks = [*prompt.chunks, others[int(rng.integers(len(others)))]]
    return Prompt(prompt.head, tuple(chunks[i] for i in rng.permutation(len(chunks))), prompt.suffix)


def operations(config: ModelConfig, computed: Iterable[Tensor]) -> float:
    """Multiplications of computing tokens at these positions, layer by layer; each attends to all up to itself."""
    e, kv = config.hidden_size, config.kv_heads * config.head_dim
    q = config.heads * config.head_dim
    per_token = e * (2 * q + 2 * kv + 3 * config.intermediate_size)
    return sum(len(at) * per_token + 2 * q * int((at + 1).sum()) for at in computed)


def timed(run: Callable[[], object], rounds: int) -> float:
    """Median seconds."""
    run()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return plain.median(taken)


def measure(
    bench: Bench, tasks: Tasks, others: Tasks, task: str, count: int, chosen: list[Method]
) -> dict[Method, NDArray[np.float64]]:
    """Per method the divergences of all prompts."""
    rng = np.random.default_rng(7)
    foreign = [chunk for prompt in others.prompts(task, 8) for chunk in prompt.chunks]
    found: dict[Method, list[float]] = {method: [] for method in chosen}
    for prompt in tasks.prompts(task, count):
        picked = rng.choice(len(foreign), size=2, replace=False)
        case = bench.case(prompt, earlier_prompt(prompt, foreign, rng), [foreign[i] for i in picked])
        for method in chosen:
            found[method].append(bench.divergence(case, method))
    return {method: np.asarray(values) for method, values in found.items()}


def costs(bench: Bench, prompt: Prompt, chosen: list[Method], rounds: int) -> dict[Method, tuple[float, float, float]]:
    """Per method the share of tokens computed, of operations and of seconds, against computing the whole prompt."""
    trial, config, total = bench.trial, bench.checkpoint.config, len(prompt.tokens)
    case = bench.case(prompt, prompt, [prompt.chunks[0]])
    whole = operations(config, [torch.arange(total)] * config.layers)
    full = timed(lambda: trial.compute(prompt.tokens, 1), rounds)
    found = {}
    for method in chosen:
        placed, selector = blended(case, method.stored), method.selector(case)
        blend = Blend(placed, selector)
        trial.run(placed, blend)
        seconds = timed(lambda p=placed, s=selector: trial.blend(p, s, 1), rounds)  # type: ignore[misc]
        tokens = sum(blend.computed) / (total * config.layers)
        found[method] = (tokens, operations(config, blend.positions) / whole, seconds / full)
    return found


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the plots")
    parser.add_argument("--model", type=Path, default=BUNDLED, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=200, help="per task")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of time, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model, name="quality", dtype="float32")
    bench = Bench(checkpoint, capacity=4096)
    text, head = held_out(data_dir()), tuple(checkpoint.tokenizer.encode_rendered("<|begin|><|user|>")[0])
    tasks, others = (Tasks(text, checkpoint.tokenizer, head, seed) for seed in (args.seed, args.seed + 1000))
    chosen = methods()
    found = {}
    for task in TASKS:
        began = time.monotonic()
        found[task] = measure(bench, tasks, others, task, args.prompts, chosen)
        print(f"{task}: {args.prompts} prompts in {time.monotonic() - began:.0f} s", flush=True)
    short = costs(bench, next(tasks.prompts("quote", 1)), chosen, args.rounds)
    long = costs(bench, tasks.long(6, 512), chosen, args.rounds)
    rows = []
    for method in chosen:
        quality = {task: relative(found[task][method], found[task][chosen[0]]) for task in TASKS}
        rows.append(Row(method.name, method.stored, method.ratio, quality, *short[method], long[method][2]))
    facts = {"model": checkpoint.fingerprint, "prompts": args.prompts, "threads": args.threads, "seed": args.seed}
    save(rows, facts, args.out)
    print(table(rows))


if __name__ == "__main__":
    main()
