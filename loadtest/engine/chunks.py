"""Measures time to the first token of prompts whose texts were computed before, in another order, over a real socket.

`python -m loadtest.engine.chunks [--model bundled|DIR] [--dtype DTYPE] [--selector sensitive] [--ratio .15]
[--rounds 20] [--json] [--quick]`. Two engines, with reuse and with `--reuse off`, are asked the same prompts in turn: a
head of its own, so that no prefix matches, 6 texts of 512 tokens in an order of its own, and a question. First when
the texts are new, then with the stored texts in memory, decoded in the pool, and, after a restart, on disk (in
the page cache of the system, if that still has them). Beside the times stand the operations of what was computed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.assembly import hot_bytes
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.executor import BLOCK_SIZE, block_bytes
from engine.reuse.point import FILE
from engine.reuse.trial import operations
from engine.settings import usable_cores
from loadtest.bench import machine
from loadtest.bench_client import BenchError
from loadtest.engine.process import serving
from loadtest.engine.reusing import Asker, Heard, Manner, Texts, asked, asking, model_of
from loadtest.table import Bar, Row, absolute, ratio, render

_QUESTION = "Which of these words come first, and which of them come last?"
_HEAD = 12
"""Tokens of the head that no other prompt has."""
_CALM = 0.2
"""Seconds until the next prompt when an engine says that it has nothing to do."""
_ROOM = 2
"""Prompts that fit the pool, where decoded chunks are to be few."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int = 20
    chunks: int = 6
    tokens: int = 512
    """Of a chunk."""

    @property
    def prompt(self) -> int:
        """Tokens of a prompt at most, with what the template adds."""
        return self.chunks * (self.tokens + 8) + 256


QUICK = Sizes(rounds=2, chunks=2, tokens=96)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt, with reuse and without."""

    on: Heard
    off: Heard


@dataclass(slots=True)
class Subject:
    """A model, its point, and groups of texts that stand in one prompt."""

    directory: Path
    checkpoint: Checkpoint
    manner: Manner
    sizes: Sizes
    threads: int
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    texts: Texts = field(init=False)
    groups: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Texts(self.checkpoint.tokenizer, self.checkpoint.config.vocab_size)
        group = self.sizes.chunks * self.sizes.tokens * block_bytes(self.checkpoint) // BLOCK_SIZE
        rounds = min(self.sizes.rounds, hot_bytes(self._memory(roomy=True)) // group)
        if rounds < self.sizes.rounds:
            print(f"{rounds} rounds: the decoded texts of more have no room beside the pool", file=sys.stderr)
        self.groups = [[self.texts.text(self.sizes.tokens) for _ in range(self.sizes.chunks)] for _ in range(rounds)]

    def _memory(self, *, roomy: bool) -> int:
        tokens = (4 * self.sizes.rounds if roomy else _ROOM) * self.sizes.prompt
        return -(-tokens // BLOCK_SIZE) * block_bytes(self.checkpoint)

    def arguments(self, *, roomy: bool) -> list[str]:
        """Of both engines; in a `roomy` one all decoded chunks fit beside the pool."""
        memory = self._memory(roomy=roomy)
        dtype = str(self.checkpoint.dtype).removeprefix("torch.")
        named = ["--model", str(self.directory), "--dtype", dtype, "--threads", str(self.threads)]
        return [*named, "--kv-memory", str(memory)]

    def prompt(self, group: Sequence[str]) -> dict[str, object]:
        """In an order of its own, behind a head of its own."""
        return asked(self.texts.text(_HEAD), self._random.sample(group, len(group)), _QUESTION)

    def operations(self, heard: Heard) -> float:
        """Of what was computed for an answer, relative to its whole prompt. Places of tokens are taken as even."""
        config, total = self.checkpoint.config, heard.prompt
        places = torch.from_numpy(np.linspace(0, total - 1, total - heard.cached).astype(np.int64))
        whole = operations(config, [torch.arange(total)] * config.layers)
        return operations(config, [places] * config.layers) / whole


@contextlib.asynccontextmanager
async def both(subject: Subject, root: Path, *, roomy: bool = False) -> AsyncIterator[tuple[Asker, Asker]]:
    """Engines with reuse and without, warm. Raises BenchError."""
    arguments = subject.arguments(roomy=roomy)
    stored = ("--reuse-point", str(root / FILE), "--kv-disk", str(root / "kv"))
    with serving(*arguments, *stored) as with_reuse, serving(*arguments, "--reuse", "off") as without:
        async with asking(with_reuse.url) as on, asking(without.url) as off:
            warm = asked(subject.texts.text(_HEAD), [], subject.texts.text(subject.sizes.prompt // 2))
            for engine in (on, off):
                await engine.ask(warm)
                await engine.quiet()
            yield on, off


async def compared(subject: Subject, on: Asker, off: Asker, tier: str) -> list[Pair]:
    """Every group once, in turn with reuse and without. Raises BenchError where the chunks came from elsewhere."""
    pairs = []
    for index, group in enumerate(subject.groups):
        body = subject.prompt(group)
        order = (on, off) if index % 2 else (off, on)
        heard = {}
        for engine in order:
            heard[engine] = await engine.ask(body)
            await engine.quiet()
            await asyncio.sleep(_CALM)
        pairs.append(Pair(heard[on], heard[off]))
        if (found := pairs[-1].on).tier != tier or (tier != "none" and found.chunks != len(group)):
            raise BenchError(f"{len(group)} chunks were due from {tier}: {found}")
    return pairs


async def measure(subject: Subject, root: Path) -> dict[str, list[Pair]]:
    """All tiers, by name. Raises BenchError."""
    subject.manner.point(subject.checkpoint).save(root / FILE)
    found = {}
    async with both(subject, root) as (on, off):
        found["new"] = await compared(subject, on, off, "none")
        found["memory"] = await compared(subject, on, off, "memory")
    async with both(subject, root) as (on, off):
        found["disk"] = await compared(subject, on, off, "disk")
    async with both(subject, root, roomy=True) as (on, off):
        await compared(subject, on, off, "disk")
        found["pool"] = await compared(subject, on, off, "pool")
    return found


def rows(subject: Subject, found: dict[str, list[Pair]]) -> list[Row]:
    """The table."""
    sizes = subject.sizes
    name = f"first token, {sizes.chunks} × {sizes.tokens} tokens and a question"
    listed = [_timed(f"{name}, texts are new", found["new"], Bar("<=", 1.03, "x"))]
    for tier, limit in (("pool", 0.40), ("memory", 0.40), ("disk", 0.45)):
        pairs = found[tier]
        counted = statistics.median(subject.operations(pair.on) for pair in pairs)
        measured = statistics.median(pair.on.first / pair.off.first for pair in pairs)
        listed.append(_timed(f"{name}, from {tier}", pairs, Bar("<=", limit, "x")))
        listed.append(_quartiles(f"… quartiles, from {tier}", pairs))
        listed.append(absolute("… operations of what was computed", counted, "x"))
        listed.append(
            absolute("… saved, of what operations allow", (1 - measured) / (1 - counted), "x", Bar(">=", 0.8, "x"))
        )
        listed.append(absolute("… operations over time", counted / measured, "x"))
    return listed


def _timed(name: str, pairs: Sequence[Pair], bar: Bar) -> Row:
    ours, theirs = [1e3 * pair.on.first for pair in pairs], [1e3 * pair.off.first for pair in pairs]
    return ratio(name, "ms", ours, theirs, "everything computed", bar)


def _quartiles(name: str, pairs: Sequence[Pair]) -> Row:
    low, middle, high = np.quantile([pair.on.first / pair.off.first for pair in pairs], (0.25, 0.5, 0.75)).tolist()
    return Row(name, middle, "x", judged=middle, judged_unit="x", low=low, high=high)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0, 1 when something did not do what is measured."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine.chunks", description=__doc__)
    parser.add_argument("--model", default="bundled", help="bundled, or a directory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--selector", default="sensitive", choices=("sensitive", "epic", "cacheblend", "kvshare"))
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--codec", default=Manner().codec)
    parser.add_argument("--rounds", type=int, default=Sizes().rounds)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads of both engines")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small counts: shows that it works, not how fast it is")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes(rounds=options.rounds)
    manner = Manner(options.selector, options.ratio, codec=options.codec)
    try:
        subject = Subject(*model_of(options.model, options.dtype), manner, sizes, options.threads)
        with tempfile.TemporaryDirectory(prefix="hitpath-chunks-") as root:
            table = rows(subject, asyncio.run(measure(subject, Path(root))))
    except (BenchError, CheckpointError) as error:
        print(f"chunks: {error}", file=sys.stderr)
        return 1
    described = machine() | {
        "torch": torch.__version__,
        "threads": options.threads,
        "dtype": str(subject.checkpoint.dtype),
    }
    if options.json:
        print(json.dumps({"machine": described, "figures": [row.document() for row in table]}, indent=2))
    else:
        print(render(table))
        print("\n" + ", ".join(f"{name} {value}" for name, value in described.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
