"""Prints one table: every figure of Hitpath beside its ceiling, taken in the same run, its bar and whether it holds.

`python -m loadtest.bench [--json] [--quick] [--only NAME,...]`. Everything runs as real processes over real sockets. A
figure that misses its bar is shown, it is no failure of the bench; the whole takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from loadtest import bench_gateway, bench_store
from loadtest.bench_client import BenchError
from loadtest.bench_gateway import Place, Sizes
from loadtest.bench_servers import Cores
from loadtest.table import Bar, Row, absolute, ratio, render

_KIB = 1024


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    requests: Sizes
    entries: int
    """Of the largest store."""


FULL = Scale(Sizes(), 100_000)
QUICK = Scale(Sizes(rounds=3, hits=500, known=100, paraphrases=30, alone=30, misses=200, streams=10), 2_000)

Part = Callable[[Scale, Path], list[Row]]
"""What is measured together; the folder is for what servers write, and shared by all parts."""


def _on_sockets(part: Callable[[Place, Sizes], Coroutine[Any, Any, list[Row]]]) -> Part:
    """Run a part of the gateway's bench with this process, its client, on a core of its own."""

    def run(scale: Scale, root: Path) -> list[Row]:
        cores = Cores.choose()
        with _pinned(cores.client), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(part(Place(root, cores), scale.requests))

    return run


@contextmanager
def _pinned(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _memory(scale: Scale, _: Path) -> list[Row]:
    many = bench_store.memory_per_entry(scale.entries, one_scope=True)
    lone = bench_store.memory_per_entry(scale.entries // 2, one_scope=False)
    name = "memory of an entry beside its body"
    return [
        absolute(f"{name}, {many.entries:,} in one scope", many.bytes_per_entry / _KIB, "KiB", Bar("<=", 2.4, "KiB")),
        absolute(f"{name}, {lone.entries:,} scopes of one", lone.bytes_per_entry / _KIB, "KiB", Bar("<=", 3, "KiB")),
    ]


def _recall(scale: Scale, _: Path) -> list[Row]:
    found = bench_store.recall_after_churn(scale.entries // 2)
    what = f"of {found.entries:,}, half deleted and re-added"
    return [
        absolute(f"recall@1 against flat {what}", found.after_churn, "", Bar(">=", 0.99, "")),
        ratio(f"search {what}", "ms", [found.search_ms], [found.flat_ms], "flat search"),
    ]


def _start(scale: Scale, _: Path) -> list[Row]:
    start = bench_store.start_up(scale.entries)
    name = f"start on {start.entries:,} entries"
    return [
        absolute(f"{name}: first exact hit", start.first_exact_hit, "s", Bar("<=", 1, "s")),
        absolute(f"{name}: everything found", start.loaded, "s", Bar("<=", 15, "s")),
        absolute(f"{name}: longest pause of the event loop", start.longest_pause, "s"),
    ]


PARTS: dict[str, Part] = {
    "exact": _on_sockets(bench_gateway.exact),
    "semantic": _on_sockets(bench_gateway.semantic),
    "miss": _on_sockets(bench_gateway.miss),
    "stream": _on_sockets(bench_gateway.stream),
    "idle": _on_sockets(bench_gateway.idle),
    "memory": _memory,
    "recall": _recall,
    "start": _start,
}


def measure(scale: Scale, names: Sequence[str] = tuple(PARTS)) -> list[Row]:
    """Run the parts of these names. Raises BenchError when a server does not do what is measured."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="hitpath-bench-") as root:
        for name in names:
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            rows += PARTS[name](scale, Path(root))
    return rows


def machine() -> dict[str, Any]:
    """What it was measured on, and how busy that was before."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "processor": model.partition(": ")[2] or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0, 1 when a server did not do what is measured, 2 when the command line is wrong."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small counts: shows that it works, not how fast it is")
    parser.add_argument("--only", type=_names, default=tuple(PARTS), metavar="NAME,...", help=f"of {', '.join(PARTS)}")
    options = parser.parse_args(arguments)
    described = machine()
    try:
        rows = measure(QUICK if options.quick else FULL, options.only)
    except BenchError as error:
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


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
