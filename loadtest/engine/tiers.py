"""Ten minutes of load while the tiers below the pool fill, evict and fail: is each request answered, and rightly?

`python -m loadtest.engine.tiers [--minutes 10] [--selector full,sensitive] [--model bundled|DIR] [--json]`. Two engines
are asked the same prompts of texts in ever another order: one with a small pool, a small memory tier, a directory and a
Redis, and one with `--reuse off`. The minutes are shared out among the selectors, and those of each among what
happens to the tiers, all of it real: they fill and evict; the file system is full; files cannot be read; files are
damaged; reading them is slow, or hangs; the directory is deleted; Redis hangs, is gone, and is back, empty. With
`full`, in float32, all answers must be the same; else the share that agrees is shown. Without redis-server, or where no
file system may be mounted, that part is left out, and said so. Exit codes: 0 everything holds, 1 something does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.executor import BLOCK_SIZE, block_bytes
from engine.reuse.point import FILE, SelectorName
from loadtest.bench_client import BenchError
from loadtest.engine.process import Served, serving
from loadtest.engine.reusing import Asker, Manner, Texts, asked, asking, model_of

_MiB = 2**20
_FILES = 24 * _MiB
"""Of the file system that is mounted; more than the engine is told it may use is never there."""
_TEXTS, _TOKENS, _MOST = 400, 160, 4
"""Texts, tokens of each, and how many stand in a prompt at most."""
_ANSWER = 8
_SLOWLY = 0.1
"""Seconds until a slow file says anything."""
_CLIENTS = 3
_POOL = 4096
"""Tokens of the pool."""
_WARM_SHARE, _LATE_SHARE = 1 / 3, 3 / 4
"""Of the time; then memory is warm, and after the other all that can happen has happened once."""
_MORE, _GROWTH = 64, 4.0
"""Most MiB that memory may be above what it was when warm, for what hangs; most a minute, late, that it may grow."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tiers are."""

    disk: Path
    """The engine's directory, on a file system of its own where `small`."""
    small: bool
    redis: int | None
    """Its port; None: there is none."""
    server: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """The last one is the Redis that runs."""

    def start_redis(self) -> None:
        """Start it, empty."""
        command = ["redis-server", "--port", str(self.redis), "--save", "", "--appendonly", "no", "--maxmemory", "16mb"]
        self.server.append(subprocess.Popen([*command, "--maxmemory-policy", "allkeys-lru"], stdout=subprocess.DEVNULL))

    def stop_redis(self) -> None:
        """End it, hanging or not."""
        self.server[-1].kill()
        self.server[-1].wait()

    def files(self) -> list[Path]:
        """What the engine wrote of chunks."""
        return [path for path in self.disk.rglob("*.data") if path.is_file()]


Injury = Callable[[Place], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _nothing(place: Place) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _full(place: Place) -> Iterator[None]:
    """Another file takes all that is left."""
    filler = place.disk.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while place.small:
            file.write(bytes(64 * 1024))
            file.flush()
    yield
    filler.unlink(missing_ok=True)


@contextlib.contextmanager
def _unreadable(place: Place) -> Iterator[None]:
    """Files become directories: opening them is an error, whoever tries."""
    for path in place.files():
        with contextlib.suppress(OSError):
            path.unlink()
            path.mkdir()
    yield


@contextlib.contextmanager
def _damaged(place: Place) -> Iterator[None]:
    """A bit of each file is another one, and every fourth ends too early."""
    for number, path in enumerate(place.files()):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            size = path.stat().st_size
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 16]))
            if not number % 4:
                file.truncate(size // 3)
    yield


@contextlib.contextmanager
def _hanging(place: Place) -> Iterator[None]:
    """Every eighth file becomes a pipe that nobody writes to: who opens it waits until the end."""
    pipes = place.files()[::8]
    for path in pipes:
        with contextlib.suppress(OSError):
            path.unlink()
            os.mkfifo(path)
    yield
    _unpipe(pipes)


@contextlib.contextmanager
def _slow(place: Place) -> Iterator[None]:
    """Every fourth file becomes a pipe: all of them together say what they said at no more than a disk's few files."""
    said: dict[Path, bytes] = {}
    for path in place.files()[::4]:
        with contextlib.suppress(OSError):
            said[path] = path.read_bytes()
            path.unlink()
            os.mkfifo(path)
    over = threading.Event()
    feeder = threading.Thread(target=_feed, args=(said, over))
    feeder.start()
    try:
        yield
    finally:
        over.set()
        feeder.join()
    _unpipe(said)


def _unpipe(paths: Iterable[Path]) -> None:
    """Let go of who still reads these pipes, and remove them."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_fifo():
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
                path.unlink()


def _feed(said: Mapping[Path, bytes], over: threading.Event) -> None:
    """Say it to whoever reads, one after the other."""
    while not over.wait(0.02):
        for path, data in said.items():
            # Nobody reads, it is gone, or who read has gone: all of that is an error, and none of it matters.
            with contextlib.suppress(OSError):
                pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                with os.fdopen(pipe, "wb", buffering=0) as file:
                    if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
                        continue  # it was written anew
                    over.wait(_SLOWLY)
                    os.set_blocking(pipe, True)
                    file.write(data)


@contextlib.contextmanager
def _deleted(place: Place) -> Iterator[None]:
    """The directory is gone."""
    shutil.rmtree(place.disk, ignore_errors=True)
    yield


@contextlib.contextmanager
def _redis_hangs(place: Place) -> Iterator[None]:
    place.server[-1].send_signal(signal.SIGSTOP)
    yield
    place.server[-1].send_signal(signal.SIGCONT)


@contextlib.contextmanager
def _redis_gone(place: Place) -> Iterator[None]:
    place.stop_redis()
    yield
    place.start_redis()


INJURIES: Mapping[str, Injury] = MappingProxyType(
    {
        "filling": _nothing,
        "full disk": _full,
        "read errors": _unreadable,
        "refilling": _nothing,
        "damaged files": _damaged,
        "slow reads": _slow,
        "reads that hang": _hanging,
        "deleted directory": _deleted,
        "redis hangs": _redis_hangs,
        "redis gone": _redis_gone,
        "all back": _nothing,
    }
)


@dataclass(slots=True)
class Tally:
    """What came of the requests of a phase."""

    answered: int = 0
    failed: int = 0
    equal: int = 0
    same: int = 0
    """Leading characters that agree, of …"""
    characters: int = 0
    slowest: float = 0.0
    memory: float = 0.0
    """MiB of the engine in the end."""
    tiers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One selector."""

    selector: str
    phases: dict[str, Tally]
    memory_mib: tuple[float, float]
    """When warm, and in the end."""
    growth: tuple[float, float]
    """MiB a minute, since it was warm and late."""
    counted: dict[str, float]
    """By the engine, in the end."""
    same: bool
    """Whether all answers must be."""

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words."""
        tallies = self.phases.values()
        found = [problem for tally in tallies for problem in tally.problems[:3]]
        if lost := sum(tally.failed for tally in tallies):
            found.append(f"{lost} requests were not answered")
        if self.same and (other := sum(tally.answered - tally.equal for tally in tallies)):
            found.append(f"{other} answers are others")
        if self.growth[1] > _GROWTH:
            found.append(f"memory grows by {self.growth[1]:.1f} MiB a minute late")
        if (more := self.memory_mib[1] - self.memory_mib[0]) > _MORE:
            found.append(f"memory is {more:.0f} MiB more than it was")
        found += [f"{name} is {self.counted[name]:g}" for name in _ZERO if self.counted[name]]
        return found


_ZERO = (
    "hitpath_engine_check_failures_total",
    "hitpath_engine_reuse_book_failures_total",
    "hitpath_engine_blocksused",
    "hitpath_engine_kv_writing_bytes",
)
"""When nothing runs any more. Pins that were left behind count as failures of the books."""


class Load:
    """Clients that ask two engines the same."""

    def __init__(self, texts: Sequence[str], on: Asker, off: Asker, seed: int) -> None:
        self._texts, self._on, self._off, self._random = texts, on, off, random.Random(seed)
        self._weights = [1 / (1 + place) ** 0.7 for place in range(len(texts))]

    async def phase(self, seconds: float) -> Tally:
        """Ask for so long."""
        tally, until = Tally(), time.monotonic() + seconds
        await asyncio.gather(*(self._client(tally, until) for _ in range(_CLIENTS)))
        return tally

    async def _client(self, tally: Tally, until: float) -> None:
        while time.monotonic() < until:
            try:
                await self._one(tally)
            except (BenchError, OSError, TimeoutError, ValueError) as error:
                tally.failed += 1
                tally.problems.append(f"{type(error).__name__}: {error}")

    async def _one(self, tally: Tally) -> None:
        chosen = dict.fromkeys(self._random.choices(self._texts, self._weights, k=self._random.randint(1, _MOST)))
        head, question = (" ".join(self._random.choices("abcdefghij", k=count)) for count in (6, 12))
        body = asked(head, list(chosen), question)
        began = time.monotonic()
        ours = await self._on.ask(body, _ANSWER)
        tally.slowest = max(tally.slowest, time.monotonic() - began)
        theirs = await self._off.ask(body, _ANSWER)
        tally.answered += 1
        tally.equal += ours.text == theirs.text
        tally.same += sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours.text, theirs.text, strict=False))
        )
        tally.characters += max(len(ours.text), len(theirs.text))
        tally.tiers[ours.tier] += 1


async def soak(texts: Sequence[str], engines: tuple[Served, Served], place: Place, minutes: float) -> dict[str, Any]:
    """All phases one after the other; what `Verdict` is made of."""
    samples: list[tuple[float, float]] = []
    phases: dict[str, Tally] = {}
    injuries = {name: injury for name, injury in INJURIES.items() if place.redis is not None or "redis" not in name}
    async with asking(engines[0].url) as on, asking(engines[1].url) as off:
        watching = asyncio.create_task(_watch(engines[0], samples))
        for number, (name, injury) in enumerate(injuries.items()):
            with injury(place):
                phases[name] = await Load(texts, on, off, number).phase(minutes * 60 / len(injuries))
                phases[name].memory = engines[0].resident() / _MiB
        watching.cancel()
        await on.quiet()
        await asyncio.sleep(3)  # books are checked a second after the last step
        counted = await on.figures()
    warm, late = (np.array(samples[int(len(samples) * share) :]) for share in (_WARM_SHARE, _LATE_SHARE))
    growth = tuple(60 * float(np.polyfit(part[:, 0], part[:, 1], 1)[0]) for part in (warm, late))
    memory = (float(warm[0, 1]), float(warm[-1, 1]))
    return {"phases": phases, "memory_mib": memory, "growth": growth, "counted": _told(counted)}


def _told(figures: Mapping[str, float]) -> dict[str, float]:
    shown = ("hitpath_engine_kv_", "hitpath_engine_reuse_")
    return {name: value for name, value in figures.items() if name in _ZERO or (value and name.startswith(shown))}


async def _watch(served: Served, samples: list[tuple[float, float]]) -> None:
    while True:
        if served.process.poll() is not None:
            raise BenchError(f"the engine ended with exit code {served.process.returncode}")
        samples.append((time.monotonic(), served.resident() / _MiB))
        await asyncio.sleep(1)


@contextlib.contextmanager
def placed() -> Iterator[Place]:
    """A small file system and a Redis, where they can be had."""
    with tempfile.TemporaryDirectory(prefix="hitpath-tiers-") as root, contextlib.ExitStack() as stack:
        mounted = Path(root) / "small"
        mounted.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={_FILES}", "tmpfs", str(mounted)]
        small = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
        if small:
            stack.callback(subprocess.run, ["umount", "-l", str(mounted)], check=False)
        place = Place(mounted / "kv", small, _free_port() if shutil.which("redis-server") else None)
        if place.redis is not None:
            place.start_redis()
            stack.callback(place.stop_redis)
        yield place


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def run(model: Path, checkpoint: Checkpoint, manner: Manner, minutes: float) -> Verdict:
    """One selector. Raises BenchError."""
    source = Texts(checkpoint.tokenizer, checkpoint.config.vocab_size)
    texts = [source.text(_TOKENS) for _ in range(_TEXTS)]
    memory = str(_POOL // BLOCK_SIZE * block_bytes(checkpoint))
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    common = ("--model", str(model), "--dtype", dtype, "--kv-memory", memory)
    with placed() as place, tempfile.TemporaryDirectory() as folder:
        point = Path(folder) / FILE
        manner.point(checkpoint).save(point)
        tiers = ["--kv-host", "8MiB", "--kv-disk", str(place.disk), "--kv-disk-size", str(_FILES)]
        redis = [] if place.redis is None else ["--kv-redis", f"redis://127.0.0.1:{place.redis}/0"]
        reusing = serving(*common, "--reuse-point", str(point), *tiers, *redis)
        with reusing as on, serving(*common, "--reuse", "off") as off:
            if not place.small:
                print("no file system may be mounted here: the disk is never full", file=sys.stderr)
            if place.redis is None:
                print("no redis-server here: that tier is left out", file=sys.stderr)
            found = asyncio.run(soak(texts, (on, off), place, minutes))
    return Verdict(selector=manner.selector, same=manner.selector == "full" and dtype == "float32", **found)


def _lines(verdict: Verdict) -> Iterator[str]:
    yield f"\n{verdict.selector}"
    yield "| phase | answered | failed | same answer | same leading characters | slowest, s | MiB | tiers |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, tally in verdict.phases.items():
        shares = (tally.equal / max(1, tally.answered), tally.same / max(1, tally.characters))
        tiers = ", ".join(f"{tier} {count}" for tier, count in sorted(tally.tiers.items()))
        yield (
            f"| {name} | {tally.answered} | {tally.failed} | {shares[0]:.3f} | {shares[1]:.3f} | {tally.slowest:.2f} "
            f"| {tally.memory:.0f} | {tiers} |"
        )
    warm, end = verdict.memory_mib
    rates = f"{verdict.growth[0]:+.2f} a minute from then on, {verdict.growth[1]:+.2f} late"
    yield f"memory: {warm:.0f} MiB warm, {end:.0f} in the end, {rates}"
    yield ", ".join(f"{name} {value:g}" for name, value in verdict.counted.items())
    yield "everything holds" if not verdict.failures else "DOES NOT HOLD: " + "; ".join(verdict.failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine.tiers", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--selector", default="full,sensitive", help="one or several")
    parser.add_argument("--model", default="bundled", help="bundled, or a directory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    names: list[SelectorName] = options.selector.split(",")
    try:
        model, checkpoint = model_of(options.model, options.dtype)
        verdicts = [run(model, checkpoint, Manner(name), options.minutes / len(names)) for name in names]
    except (BenchError, CheckpointError, OSError) as error:
        print(f"tiers: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(verdict) | {"failures": verdict.failures} for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            print("\n".join(_lines(verdict)))
    return 1 if any(verdict.failures for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
