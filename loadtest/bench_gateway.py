"""Measures the gateway over real sockets: exact hits, semantic hits, misses, streams, idle memory.

The gateway has a core of its own; client and scripted backend share the other. A figure and its ceiling are measured in
turns, round by round, because a shared machine changes its speed within seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, cast

import numpy as np

from cachestore import Store, StoreOptions
from gateway.embedding.local import LocalEmbedder
from loadtest import bench_servers as servers
from loadtest.bench_client import Answer, BenchError, Connection, chat, check, connect, load, post
from loadtest.bench_servers import Cores, Server
from loadtest.bench_store import fill
from loadtest.table import Bar, Row, absolute, difference, ratio
from policies.category import CategoryPolicy, CategoryTable
from policies.eviction import ValuePerByte

_TOKENS = 64
"""Words of an answer."""
_SCOPES = 64
_HELPFUL = "You are a helpful assistant."
_FETCH_ANEW = b"cache-control: no-cache\r\n"
_MODES: dict[str, dict[str, Any]] = {
    # A threshold nobody reaches: every question is embedded, classified and searched, and then missed.
    "semantic": {"default": {"threshold": 1.0}},
    "exact": {"embedder": {"kind": "none"}},
}
_CATEGORIES = tuple(CategoryTable(CategoryPolicy("default"), {}).policies)
_HIT = Bar("<=", 1.6, "x")
_NEIGHBOURS = 4
"""What the gateway asks of the index."""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured, all but `rounds` per round."""

    rounds: int = 7
    hits: int = 4000
    known: int = 1000
    """Questions stored before semantic hits are measured, all in one scope."""
    paraphrases: int = 150
    alone: int = 150
    """Misses one after the other."""
    misses: int = 1500
    """Misses on many connections."""
    streams: int = 40


@dataclass(frozen=True, slots=True)
class Place:
    """Where it is measured."""

    root: Path
    """A folder for data directories."""
    cores: Cores


# --- exact hits -------------------------------------------------------------------------------------------------------


async def exact(place: Place, sizes: Sizes) -> list[Row]:
    """Hits per second and their latencies on eight connections, against the echo with bodies of the same size."""
    texts = [f"{number:03} {'about ' * 90}" for number in range(64)]
    storing = [chat(_HELPFUL, text, headers=_FETCH_ANEW) for text in texts]
    asked = [chat(_HELPFUL, text) for text in texts]
    hits, echoes = [], []
    with _backend(place) as backend, _gateway(place, backend, {}) as gateway, servers.echo(place.cores.server) as echo:
        async with _connected(gateway.port) as connection:
            answers = [check(await connection.ask(request), b"stored") for request in storing]
        echoed = [_of_same_size(request, answer) for request, answer in zip(asked, answers, strict=True)]
        for _ in range(1 + sizes.rounds):
            hits.append(await load(gateway.port, _cycled(asked, sizes.hits), connections=8, expect=b"detail=exact"))
            echoes.append(await load(echo.port, _cycled(echoed, sizes.hits), connections=8))
    # The first round warms up.
    ours, theirs = hits[1:], echoes[1:]
    rates = [one.rate for one in ours], [one.rate for one in theirs]
    rows = [ratio("exact hits, 8 connections", "/s", *rates, "JSON echo", Bar(">=", 0.4, "x"))]
    for share in (50, 99):
        times = [one.percentile(share) for one in ours], [one.percentile(share) for one in theirs]
        rows.append(ratio(f"exact hit p{share}, 8 connections", "ms", *times, "JSON echo"))
    return rows


def _of_same_size(request: bytes, answer: Answer) -> bytes:
    """Ask the echo for as many bytes as the gateway reads and writes: half of them each way."""
    body = request.partition(b"\r\n\r\n")[2]
    document = json.loads(answer.body) | {"pad": ""}
    missing = (len(body) + len(answer.body)) // 2 - len(_compact(document))
    return post("/echo", _compact(document | {"pad": "x" * max(0, missing)}))


def _compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _cycled(requests: Sequence[bytes], count: int) -> Iterator[bytes]:
    return itertools.islice(itertools.cycle(requests), count)


# --- semantic hits ----------------------------------------------------------------------------------------------------


async def semantic(place: Place, sizes: Sizes) -> list[Row]:
    """Paraphrases one after the other, against embedding and search of the same texts with nothing around them."""
    # No category refuses a paraphrase, so that each takes the whole way, the classifier included.
    rules = {name: {"mode": "semantic", "threshold": 0.85} for name in _CATEGORIES}
    known = [question(number) for number in range(sizes.known)]
    asked = paraphrases(known)
    hits, lookups = [], []
    cache = {"categories": rules, "judge": {"kind": "threshold"}}
    with _backend(place) as backend, _gateway(place, backend, cache) as gateway, _bare_lookups(place, known) as bare:
        await _store(known, gateway)
        async with _connected(gateway.port) as connection:
            for _ in range(1 + sizes.rounds):
                texts = list(itertools.islice(asked, sizes.paraphrases))
                answers = [check(await connection.ask(chat(_HELPFUL, text)), b"detail=semantic") for text in texts]
                hits.append(_median_ms([answer.whole for answer in answers]))
                lookups.append(_median_ms(bare(texts)))
    row = ratio("semantic hit p50, similarity alone", "ms", hits[1:], lookups[1:], "embedding + search", _HIT)
    return [row, await _judging(place, sizes, known)]


async def _judging(place: Place, sizes: Sizes, known: Sequence[str]) -> Row:
    """Ask the gateway itself (Server-Timing) how much of a semantic hit is the pair judge."""
    # The largest budget: how long it takes does not depend on it, and nearly every paraphrase is a hit then.
    rules = {name: {"error_budget": 0.2} for name in _CATEGORIES}
    with _backend(place) as backend, _gateway(place, backend, {"categories": rules}) as gateway:
        await _store(known, gateway)
        async with _connected(gateway.port) as connection:
            count = min(len(known), sizes.rounds * sizes.paraphrases)
            asked = [text.replace("How do I", "What is the best way to", 1) for text in known[:count]]
            answers = [check(await connection.ask(chat(_HELPFUL, text))) for text in asked]
    took = [_room(answer.head, b"judge") for answer in answers if b"detail=semantic" in answer.head]
    if len(took) < count / 2:
        raise BenchError(f"the judge serves {len(took)} of {count} paraphrases: too few to time")
    return absolute("of which judging p50, pair model", statistics.median(took), "ms", Bar("<=", 3, "ms"))


async def _store(known: Sequence[str], gateway: Server) -> None:
    stored = (chat(_HELPFUL, text, headers=_FETCH_ANEW) for text in known)
    await load(gateway.port, stored, connections=16, expect=b"stored")


def _room(head: bytes, name: bytes) -> float:
    """Milliseconds that Server-Timing gives for a room."""
    return float(head.partition(name + b";dur=")[2].split(b",")[0].split()[0])


@contextmanager
def _bare_lookups(place: Place, known: Sequence[str]) -> Iterator[Callable[[Sequence[str]], list[float]]]:
    """Embedding and search alone, in a process on the server's core: texts in, seconds out."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=_look_up, args=(theirs, place.root, place.cores.server, known))
    worker.start()
    theirs.close()

    def seconds(texts: Sequence[str]) -> list[float]:
        ours.send(texts)
        return cast(list[float], ours.recv())

    try:
        seconds(known[:1])
        yield seconds
    finally:
        # The worker ends when nobody is left to ask.
        ours.close()
        worker.join(30)


def _look_up(pipe: Pipe[Any, Any], root: Path, core: int, known: Sequence[str]) -> None:
    os.sched_setaffinity(0, {core})
    with asyncio.Runner() as runner:
        runner.run(_serve_look_ups(pipe, root, known))


async def _serve_look_ups(pipe: Pipe[Any, Any], root: Path, known: Sequence[str]) -> None:
    embedder = await LocalEmbedder.open(root)
    options = StoreOptions(memory_budget=1 << 30, disk_budget=1 << 30, max_body=1 << 20, embedder=embedder.identity)
    store = await Store.open(root / f"bare-{os.getpid()}", options, eviction=ValuePerByte())
    scope = b"the scope of all"
    vectors = np.stack([(await embedder.embed(text)).vector for text in known])
    await fill(store, vectors, lambda _: scope)
    while (texts := await _received(pipe)) is not None:
        taken = []
        for text in texts:
            begun = time.perf_counter()
            found = store.search(scope, (await embedder.embed(text)).vector, _NEIGHBOURS, -1.0)
            taken.append(time.perf_counter() - begun)
            assert found
        pipe.send(taken)
    await store.close()
    await embedder.close()


async def _received(pipe: Pipe[Any, Any]) -> Sequence[str] | None:
    """Wait off the event loop, where the store's own tasks run."""
    try:
        return cast(Sequence[str], await asyncio.to_thread(pipe.recv))
    except EOFError:
        return None


# --- misses -----------------------------------------------------------------------------------------------------------


async def miss(place: Place, sizes: Sizes) -> list[Row]:
    """What a miss costs beside asking the backend directly, and how many one core of the gateway can take."""
    rows = []
    for mode, cache in _MODES.items():
        with _backend(place) as backend, _gateway(place, backend, cache) as gateway:
            fresh = _fresh_questions()
            rows.append(await _overhead(f"miss p50, {mode} mode", sizes.rounds, sizes.alone, fresh, gateway, backend))
            rows += await _misses_at_once(mode, sizes, fresh, gateway, backend)
            if mode == "semantic":
                rows.append(await _embedding_within(itertools.islice(fresh, sizes.alone), gateway))
    return rows


async def stream(place: Place, sizes: Sizes) -> list[Row]:
    """Time to the first event of a stream, against the backend's own.

    Not to be compared with a whole miss: while a stream is paced the gateway's core rests, and after ten idle
    milliseconds a virtual machine's core was seen to take 1.7 times as long for the very same work.
    """
    rows = []
    for mode, cache in _MODES.items():
        paced = _backend(place, "--tokens", "4", "--token-interval", "2")
        with paced as backend, _gateway(place, backend, cache) as gateway:
            name = f"first event of a stream p50, {mode} mode"
            fresh = _fresh_questions(stream=True)
            rows.append(await _overhead(name, sizes.rounds, sizes.streams, fresh, gateway, backend, stream=True))
    return rows


async def _overhead(
    name: str,
    rounds: int,
    count: int,
    fresh: Iterator[bytes],
    gateway: Server,
    backend: Server,
    *,
    stream: bool = False,
) -> Row:
    """Ask gateway and backend the same in turns, on one connection each."""
    through, direct = [], []
    async with _connected(gateway.port) as ours, _connected(backend.port) as theirs:
        for _ in range(1 + rounds):
            pairs = [
                (check(await ours.ask(request), b"fwd=miss"), check(await theirs.ask(request)))
                for request in itertools.islice(fresh, count)
            ]
            through.append(_median_ms([_time(answer, stream) for answer, _ in pairs]))
            direct.append(_median_ms([_time(answer, stream) for _, answer in pairs]))
    bar = None if stream else Bar("<=", 1.5, "ms more")
    return difference(name, "ms", through[1:], direct[1:], "backend alone", bar)


def _time(answer: Answer, stream: bool) -> float:
    return answer.first if stream else answer.whole


async def _embedding_within(fresh: Iterator[bytes], gateway: Server) -> Row:
    """Ask the gateway itself (Server-Timing) how much of a miss is the embedding."""
    async with _connected(gateway.port) as connection:
        heads = [check(await connection.ask(request), b"embed;dur=").head for request in fresh]
    took = [_room(head, b"embed") for head in heads]
    return absolute("of which embedding p50, semantic mode", statistics.median(took), "ms")


async def _misses_at_once(
    mode: str, sizes: Sizes, fresh: Iterator[bytes], gateway: Server, backend: Server
) -> list[Row]:
    rates, alone, costs = [], [], []
    for _ in range(1 + sizes.rounds):
        requests = list(itertools.islice(fresh, sizes.misses))
        before = gateway.cpu_seconds()
        rates.append((await load(gateway.port, requests, connections=64, expect=b"fwd=miss")).rate)
        costs.append((gateway.cpu_seconds() - before) / len(requests) * 1000)
        alone.append((await load(backend.port, requests, connections=64)).rate)
    return [
        ratio(f"misses on one core, {mode} mode", "/s", rates[1:], alone[1:], "backend alone", Bar(">=", 1000, "/s")),
        absolute(f"processor time of a miss, {mode} mode", statistics.median(costs[1:]), "ms"),
    ]


def _fresh_questions(*, stream: bool = False) -> Iterator[bytes]:
    """64 000 requests never asked before, spread over scopes as real traffic is."""
    for number in range(_SCOPES * 1000):
        yield chat(f"You are assistant {number % _SCOPES}.", question(number // _SCOPES), stream=stream)


# --- standing still ---------------------------------------------------------------------------------------------------


async def idle(place: Place, sizes: Sizes) -> list[Row]:
    """Memory of a gateway that has loaded its embedder and answered a little, and the time to its ready line."""
    with _backend(place) as backend:
        with _gateway(place, backend, {}):
            """The first one builds the embedder's file."""
        begun = time.perf_counter()
        with _gateway(place, backend, {}) as gateway:
            ready = time.perf_counter() - begun
            requests = itertools.islice(_fresh_questions(), 100)
            await load(gateway.port, requests, connections=4, expect=b"fwd=miss")
            resident = gateway.resident() / _MIB
    return [
        absolute("resident memory of an idle gateway", resident, "MiB", Bar("<=", 250, "MiB")),
        absolute("process start to ready line", ready, "s"),
    ]


# --- shared -----------------------------------------------------------------------------------------------------------

_VERBS = ("repair", "clean", "choose", "sell", "measure", "paint", "store", "replace", "insure", "return")
_THINGS = (
    "a bicycle chain",
    "my kitchen sink",
    "a winter coat",
    "an old piano",
    "the garden fence",
    "a laptop battery",
    "my reading glasses",
    "a camping tent",
    "the coffee machine",
    "a wooden floor",
)
_WHEN = (
    "before a long journey",
    "without special tools",
    "on a small budget",
    "for the first time",
    "in a rented flat",
    "after heavy rain",
    "when guests are coming",
    "as a gift for a friend",
    "according to the manual",
    "in less than an hour",
)
_BEFORE = (
    "Please tell me: ",
    "Hello, ",
    "Hi! ",
    "Quick question: ",
    "I wonder: ",
    "Could you say, ",
    "Hey, ",
    "Well, ",
)
_AFTER = ("", " Thanks.", " Thank you!", " Please.", " Thanks a lot!", " Cheers.", " Please help.", " Many thanks.")


def question(number: int) -> str:
    """One of a thousand short questions."""
    verb, thing, when = _VERBS[number % 10], _THINGS[number // 10 % 10], _WHEN[number // 100 % 10]
    return f"How do I {verb} {thing} {when}?"


def paraphrases(questions: Sequence[str]) -> Iterator[str]:
    """The questions in other words, each form once."""
    for before, after in itertools.product(_BEFORE, _AFTER):
        for text in questions:
            yield f"{before}{text[0].lower()}{text[1:]}{after}"


@contextmanager
def _backend(place: Place, *arguments: str) -> Iterator[Server]:
    with servers.scripted(place.cores.client, "--tokens", str(_TOKENS), *arguments) as backend:
        yield backend


@contextmanager
def _gateway(place: Place, backend: Server, cache: dict[str, Any]) -> Iterator[Server]:
    with servers.gateway(place.root, place.cores.server, backend, cache) as gateway:
        yield gateway


@asynccontextmanager
async def _connected(port: int) -> AsyncIterator[Connection]:
    connection = await connect(port)
    try:
        yield connection
    finally:
        connection.close()


def _median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000
