"""What share of an agent's prompt tokens need not be computed: with a prefix cache alone, and with chunks beside it.

`python -m loadtest.engine.agent [--trace FILE] [--room TOKENS,...] [--ratio .15] [--json]` replays the calls of
`traces/agent_miniswe.jsonl.gz` in the order of their times, as tokens of the bundled tokenizer; no model computes. A
prefix is known by whole blocks of 16 tokens, as in the engine. What stands behind it is looked for at any offset among
texts that earlier calls had to compute. `--room` bounds the tokens of each of the two, the least recently used go
first; 0 is no bound. A share of what is found, `--ratio`, counts as computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.checkpoint import BUNDLED
from engine.executor import BLOCK_SIZE
from engine.hashing import chain, origin
from engine.reuse.finding import Run, RunIndex
from engine.reuse.known import WIDTH
from engine.tokenizer import load_tokenizer
from loadtest.data import DataError, data_dir, read_rows, text_field

LEAST = 2 * WIDTH
"""Tokens of a run that is worth placing; half of a point's `least`."""


class PrefixCache:
    """Blocks that are known by themselves and all tokens before them."""

    def __init__(self, room: int) -> None:
        """`room` in tokens; 0: no bound."""
        self._most = room // BLOCK_SIZE
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, tokens: Sequence[int]) -> int:
        """Leading tokens that are known; from now on all of them are."""
        names, parent = [], origin(b"")
        for start in range(0, len(tokens) - len(tokens) % BLOCK_SIZE, BLOCK_SIZE):
            parent = chain(parent, tokens[start : start + BLOCK_SIZE])
            names.append(parent)
        known = next((place for place, name in enumerate(names) if name not in self._blocks), len(names))
        for name in reversed(names):  # a block is of no use without those before it, so they go last
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while self._most and len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
        return min(known * BLOCK_SIZE, len(tokens) - 1)


class Runs:
    """Texts that were computed, found wherever they stand."""

    def __init__(self, room: int) -> None:
        """`room` in tokens; 0: no bound."""
        self._room, self._held, self._named = room, 0, 0
        self._index = RunIndex(WIDTH)
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def serve(self, tokens: Sequence[int], first: int) -> int:
        """Tokens from `first` on that are known; from now on all of them are, but the shortest pieces."""
        runs = [run for run in self._index.find(tokens, first) if run.stop - run.start >= LEAST]
        for run in runs:
            self._sizes.move_to_end(run.name)  # type: ignore[arg-type]
        for start, stop in _between(runs, first, len(tokens)):
            if stop - start >= LEAST:
                self._add(tokens[start:stop])
        # The last token's scores are wanted.
        return sum(min(run.stop, len(tokens) - 1) - run.start for run in runs)

    def _add(self, tokens: Sequence[int]) -> None:
        self._index.add(self._named, tokens)
        self._sizes[self._named] = len(tokens)
        self._named += 1
        self._held += len(tokens)
        while self._room and self._held > self._room:
            name, size = self._sizes.popitem(last=False)
            self._index.remove(name)
            self._held -= size


def _between(runs: Sequence[Run], first: int, end: int) -> list[tuple[int, int]]:
    """What lies from `first` to `end` and in no run."""
    starts = [first, *(run.stop for run in runs)]
    return list(zip(starts, [*(run.start for run in runs), end], strict=True))


@dataclass(frozen=True, slots=True)
class Shares:
    """Of all prompt tokens."""

    room: int
    """Tokens of the prefix cache, and of the chunks; 0: no bound."""
    tokens: int
    prefix: float
    """Known as a prefix."""
    found: float
    """Known elsewhere, behind it."""
    saved: float
    """Not computed, of both."""


def shares(prompts: Sequence[Sequence[int]], room: int, ratio: float) -> Shares:
    """Replay the prompts in order."""
    cache, runs = PrefixCache(room), Runs(room)
    total = prefix = found = 0
    for tokens in prompts:
        known = cache.serve(tokens)
        found += runs.serve(tokens, known)
        prefix += known
        total += len(tokens)
    return Shares(room, total, prefix / total, found / total, (prefix + (1 - ratio) * found) / total)


def prompts_of(trace: Path, most: int | None) -> list[list[int]]:
    """The calls in the order of their times, as tokens. Raises DataError."""
    tokenizer = load_tokenizer(BUNDLED)
    calls = [
        (row["timestamp"], text_field(trace, number, row, "input")) for number, row in enumerate(read_rows(trace), 1)
    ]
    return [tokenizer.encode_text(text) for _, text in sorted(calls)[:most]]


def _row(found: Shares) -> str:
    room = f"{found.room:,} tokens" if found.room else "no bound"
    left, now = 1 - found.prefix, 1 - found.saved
    return f"| {room} | {found.prefix:.4f} | {found.prefix + found.found:.4f} | {found.saved:.4f} | {now / left:.2f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay and print; returns 0, 1 where the trace cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine.agent", description=__doc__)
    parser.add_argument("--trace", type=Path, help="default: traces/agent_miniswe.jsonl.gz of the measurement data")
    parser.add_argument("--room", default="0,262144,65536,16384", help="one or several bounds")
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--calls", type=int, help="only so many, the first (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        prompts = prompts_of(options.trace or data_dir() / "traces" / "agent_miniswe.jsonl.gz", options.calls)
    except DataError as error:
        print(f"agent: {error}", file=sys.stderr)
        return 1
    found = [shares(prompts, int(room), options.ratio) for room in options.room.split(",")]
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    print(f"{len(prompts):,} prompts of {found[0].tokens:,} tokens together\n")
    print("| room | prefix | prefix or chunk | not computed | computed, relative to prefix alone |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(_row(one) for one in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
