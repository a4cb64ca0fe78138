"""Measures the engine's speed on this machine against itself and against transformers, all in one run.

`python -m loadtest.engine.bench [--model bundled|DIR|SHAPE]... [--dtype float32,bfloat16] [--json] [--quick]`. Every
figure and its ceiling alternate within a round, on the same checkpoint, dtype, threads and lengths; no prompt comes
twice but where that is what is measured. A figure that misses its bar is shown, it is no failure of the bench.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import torch

from engine.assembly import speed_up
from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.errors import CheckpointError
from engine.executor import BLOCK_SIZE, block_bytes
from engine.settings import usable_cores
from loadtest.bench import machine
from loadtest.bench_client import BenchError
from loadtest.engine.local import Local
from loadtest.engine.process import serving
from loadtest.engine.reference import Reference
from loadtest.engine.shapes import SHAPES, write_shape
from loadtest.table import Bar, Row, absolute, ratio, render

_KNOWN_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int = 3
    answers: int = 16
    prompt: int = 64
    tokens: int = 32
    alone: int = 48
    """Tokens of the single stream."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Of the prompts whose first token is waited for."""

    @property
    def room(self) -> int:
        """Tokens of all that is in memory at once, with some to spare."""
        together = 2 * self.answers * (self.prompt + self.tokens + BLOCK_SIZE)
        return max(together, 4 * max(self.lengths)) + 1024


QUICK = Sizes(rounds=1, answers=4, prompt=16, tokens=6, alone=6, lengths=(128,))


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint under test."""

    directory: Path
    checkpoint: Checkpoint
    threads: int
    sizes: Sizes
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def __str__(self) -> str:
        return f"{self.checkpoint.name} {str(self.checkpoint.dtype).removeprefix('torch.')}"

    def prompt(self, length: int) -> list[int]:
        """One that was not used before."""
        return [self._random.randrange(3, self.checkpoint.config.vocab_size) for _ in range(length)]

    def prompts(self) -> list[list[int]]:
        """What is asked for together."""
        return [self.prompt(self.sizes.prompt) for _ in range(self.sizes.answers)]


def batching(subject: Subject, engine: Local, reference: Reference) -> Iterator[Row]:
    """Many answers at once against one after another, and against transformers; the single stream."""
    sizes = subject.sizes
    drawn = sizes.answers * sizes.tokens
    together: list[float] = []
    apart: list[float] = []
    theirs: list[float] = []
    alone: list[float] = []
    generate: list[float] = []
    engine.together(subject.prompts()[:2], 2)  # whatever is set up on first use
    reference.decode(subject.prompt(8), 2)
    for _ in range(sizes.rounds):
        prompts = subject.prompts()
        apart.append(drawn / _seconds(lambda: [engine.together([one], sizes.tokens) for one in subject.prompts()]))
        together.append(drawn / _seconds(lambda prompts=prompts: engine.together(prompts, sizes.tokens)))  # type: ignore[misc]
        theirs.append(drawn / reference.together(prompts, sizes.tokens))
        one = engine.together([subject.prompt(sizes.prompt)], sizes.alone)[0]
        alone.append((one.tokens - 1) / (one.last - one.first))
        generate.append(reference.decode(subject.prompt(sizes.prompt), sizes.alone))
    name = f"{subject}: {sizes.answers} at once"
    yield ratio(name, "tokens/s", together, apart, "one after another", Bar(">=", 4, "x"))
    yield ratio(name, "tokens/s", together, theirs, "transformers' continuous batching", Bar(">=", 1.5, "x"))
    yield ratio(f"{subject}: one stream", "tokens/s", alone, generate, "transformers' generate", Bar(">=", 1, "x"))


def first_token(subject: Subject, engine: Local) -> Iterator[Row]:
    """Time to the first token of a prompt that is known but for its last tenth."""
    for length in subject.sizes.lengths:
        if length + 1 > subject.checkpoint.config.context:
            continue
        cold: list[float] = []
        known: list[float] = []
        for _ in range(subject.sizes.rounds):
            prompt = subject.prompt(length)
            cold.append(1e3 * engine.together([prompt], 1)[0].first)
            kept = int(length * _KNOWN_SHARE)
            answer = engine.together([prompt[:kept] + subject.prompt(length - kept)], 1)[0]
            if answer.cached < kept - BLOCK_SIZE:
                raise BenchError(f"of {kept} known tokens only {answer.cached} were found")
            known.append(1e3 * answer.first)
        name = f"{subject}: first token, {length:,} tokens, 90 % known"
        yield ratio(name, "ms", known, cold, "nothing known", Bar("<=", 0.15, "x"))


def step_times(subject: Subject, engine: Local) -> Iterator[Row]:
    """What one step takes, and what of it is not the model."""
    for answers in (1, subject.sizes.answers):
        whole, model = engine.steps.of(answers)
        yield absolute(f"{subject}: step of {answers}", 1e3 * whole, "ms")
        yield absolute(f"{subject}: step of {answers}, outside the model", 1e3 * (whole - model), "ms")


async def over_http(subject: Subject, url: str) -> Row:
    """The same many answers, asked for over HTTP."""
    sizes = subject.sizes
    drawn = sizes.answers * sizes.tokens
    together: list[float] = []
    apart: list[float] = []
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(None)) as session:
        for _ in range(sizes.rounds):
            began = time.perf_counter()
            for prompt in subject.prompts():
                await _complete(session, prompt, sizes.tokens)
            halfway = time.perf_counter()
            await asyncio.gather(*(_complete(session, prompt, sizes.tokens) for prompt in subject.prompts()))
            apart.append(drawn / (halfway - began))
            together.append(drawn / (time.perf_counter() - halfway))
    name = f"{subject}: {sizes.answers} at once over HTTP"
    return ratio(name, "tokens/s", together, apart, "one after another", Bar(">=", 4, "x"))


async def _complete(session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> None:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as response:
        answer = await response.json()
    if response.status != 200 or answer["usage"]["completion_tokens"] != tokens:
        raise BenchError(f"the engine answered {response.status}: {answer}")


def measure(directory: Path, dtype: str, sizes: Sizes, threads: int) -> list[Row]:
    """All figures of one checkpoint in one dtype. Raises BenchError, CheckpointError."""
    checkpoint = load_checkpoint(directory, name=directory.name, dtype=dtype)
    speed_up(checkpoint)
    subject = Subject(directory, checkpoint, threads, sizes)
    room = sizes.room
    with Local(checkpoint, tokens=room, threads=threads).running() as engine:
        rows = list(batching(subject, engine, Reference(directory, checkpoint.dtype, threads=threads)))
        rows += first_token(subject, engine)
        rows += step_times(subject, engine)
    memory = str(-(-room // BLOCK_SIZE) * block_bytes(checkpoint))
    with serving(
        "--model", str(directory), "--dtype", dtype, "--threads", str(threads), "--kv-memory", memory
    ) as served:
        rows.insert(1, asyncio.run(over_http(subject, served.url)))
    return rows


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0, 1 when something did not do what is measured, 2 when the command line is wrong."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine.bench", description=__doc__)
    shapes = ", ".join(SHAPES)
    parser.add_argument(
        "--model", action="append", help=f"bundled, a directory, or random weights of a shape: {shapes}"
    )
    parser.add_argument("--dtype", default="float32,bfloat16", help="one or several (default: float32,bfloat16)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads of everything")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small counts: shows that it works, not how fast it is")
    options = parser.parse_args(arguments)
    described = machine() | {"torch": torch.__version__, "threads": options.threads}
    sizes = QUICK if options.quick else Sizes()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="hitpath-engine-bench-") as root:
            for model in options.model or ["bundled", "small"]:
                directory = _directory(model, Path(root))
                for dtype in options.dtype.split(","):
                    print(f"measuring {model} in {dtype} …", file=sys.stderr, flush=True)
                    rows += measure(directory, dtype, sizes, options.threads)
    except (BenchError, CheckpointError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        figures = [row.document() for row in rows]
        print(json.dumps({"machine": described, "quick": options.quick, "figures": figures}, indent=2))
    else:
        print(render(rows))
        print("\n" + ", ".join(f"{name} {value}" for name, value in described.items()))
        if options.quick:
            print("small counts: the bars are not for these figures")
    return 0


def _directory(model: str, root: Path) -> Path:
    if model == "bundled":
        return BUNDLED
    return write_shape(model, root) if model in SHAPES else Path(model)


if __name__ == "__main__":
    sys.exit(main())
