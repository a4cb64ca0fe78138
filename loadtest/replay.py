"""Replay a trace with real text against a gateway: `hitpath replay FILE --url URL`.

Each row becomes one chat completion. The recorded length of its answer is not asked for: an answer that ends because it
may not be longer counts as cut off, and is not kept by the cache. What a hit saved is estimated from the misses of the
same run: the tokens its answer holds, times the seconds a token took where one had to be generated.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from gateway.wire.sse import DONE, EventTooLarge, SseParser
from loadtest.data import DataError, read_rows
from loadtest.metrics import percentiles

TEXT_FIELDS = ("prompt", "input")
TIME_FIELDS = {"timestamp_ms": 1e-3, "timestamp": 1e-6}
"""Field -> seconds per unit."""
SHOWN_FAILURES = 5
CONCURRENCY = 8
CONCURRENCY_TIMED = 256
"""With arrival times the trace decides how many are under way; this only bounds memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a trace."""

    text: str
    arrival: float
    """Seconds; only differences count."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One complete answer."""

    kind: str
    """`exact`, `semantic`, `collapsed` or `miss`."""
    detail: str
    """For a miss: why, as Cache-Status says it."""
    total: float
    """Seconds until the last byte."""
    first: float
    """Seconds until the first event, or the answer where there is only one."""
    tokens: int
    """Completion tokens by the answer's own usage."""


@dataclass(frozen=True, slots=True)
class Failed:
    """One request without an answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class Options:
    """How to replay."""

    url: str
    """Of the API, `/v1` included."""
    model: str
    api_key: str | None
    speed: float
    """Times as fast as recorded; 0: as fast as the concurrency allows."""
    concurrency: int
    max_tokens: int | None
    stream: bool
    timeout: float


def read_trace(path: Path) -> Iterator[Request]:
    """Yield a trace's requests. Raises DataError, also for a trace that carries token counts instead of text."""
    for number, row in enumerate(read_rows(path), 1):
        yield _request(path, number, row)


def _request(path: Path, number: int, row: dict[str, Any]) -> Request:
    text = next((row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str)), None)
    if text is None:
        raise DataError(
            f"{path}: row {number}: the trace carries no text ({' or '.join(map(repr, TEXT_FIELDS))});"
            " only a trace with real text can be replayed"
        )
    arrival = next((row[name] * unit for name, unit in TIME_FIELDS.items() if _is_number(row.get(name))), 0.0)
    return Request(text, arrival)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def outcome_of(header: str | None) -> tuple[str, str]:
    """Read `Cache-Status`: the kind of answer, and for a miss its reason."""
    if header is None:
        return "miss", "no Cache-Status header: is this a Hitpath gateway?"
    names, values = set(), {}
    for part in (part.strip() for part in header.split(";")):
        name, equals, value = part.partition("=")
        names.add(name)
        if equals:
            values[name] = value.strip('"')
    if "hit" in names:
        return ("semantic" if values.get("detail") == "semantic" else "exact"), ""
    if "collapsed" in names:
        return "collapsed", ""
    return "miss", " ".join(filter(None, (values.get("fwd"), values.get("detail"))))


@dataclass(slots=True)
class Tally:
    """What one pass came to; the latencies are all that grows with the trace."""

    kinds: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    shown: list[str] = field(default_factory=list)
    total: dict[str, list[float]] = field(default_factory=lambda: {"hits": [], "misses": [], "collapsed": []})
    first: dict[str, list[float]] = field(default_factory=lambda: {"hits": [], "misses": [], "collapsed": []})
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, outcome: Answered | Failed) -> None:
        """Count one request."""
        if isinstance(outcome, Failed):
            self.failures += 1
            if len(self.shown) < SHOWN_FAILURES:
                self.shown.append(outcome.reason)
            return
        group = {"miss": "misses", "collapsed": "collapsed"}.get(outcome.kind, "hits")
        self.kinds[outcome.kind] += 1
        if outcome.kind == "miss":
            self.misses[outcome.detail] += 1
        self.total[group].append(outcome.total)
        self.first[group].append(outcome.first)
        self.tokens[group] += outcome.tokens

    def report(self, seconds_per_token: float | None) -> dict[str, Any]:
        """The pass as a JSON object."""
        answered = self.kinds.total()
        hits = self.kinds["exact"] + self.kinds["semantic"]
        saved = self.tokens["hits"] + self.tokens["collapsed"]
        return {
            "requests": answered + self.failures,
            "failures": self.failures,
            "failure_reasons": self.shown,
            "hits": {name: self.kinds[name] for name in ("exact", "semantic", "collapsed")},
            "misses": self.kinds["miss"],
            "miss_reasons": dict(self.misses),
            "hit_rate": hits / answered if answered else None,
            "latency_ms": {
                group: {"total": percentiles(self.total[group]), "first_event": percentiles(self.first[group])}
                for group in self.total
            },
            "tokens_saved": saved,
            "seconds_saved": None if seconds_per_token is None else round(saved * seconds_per_token, 3),
            "seconds": round(self.seconds, 3),
        }


class Client:
    """Sends requests as one application would."""

    def __init__(self, session: aiohttp.ClientSession, options: Options) -> None:
        self._session = session
        self._options = options

    async def send(self, request: Request) -> Answered | Failed:
        """Ask, read to the end. What goes wrong on the way is an outcome, not an exception."""
        started = time.perf_counter()
        try:
            async with self._session.post(
                f"{self._options.url}/chat/completions",
                data=orjson.dumps(self._body(request)),
                headers={"content-type": "application/json"},
            ) as response:
                if response.status != 200:
                    return Failed(f"status {response.status}: {(await response.read())[:200].decode(errors='replace')}")
                kind, detail = outcome_of(response.headers.get("cache-status"))
                read = _read_stream if self._options.stream else _read_json
                first, tokens = await read(response)
                return Answered(kind, detail, time.perf_counter() - started, first - started, tokens)
        except (aiohttp.ClientError, TimeoutError, BrokenAnswer) as error:
            return Failed(f"{type(error).__name__}: {error}")

    def _body(self, request: Request) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {"model": options.model, "messages": [{"role": "user", "content": request.text}]}
        if options.max_tokens is not None:
            body["max_tokens"] = options.max_tokens
        if options.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


class BrokenAnswer(Exception):
    """Status 200, but not a whole answer."""


async def _read_stream(response: aiohttp.ClientResponse) -> tuple[float, int]:
    """Read to `[DONE]`; returns when the first event came and the usage's completion tokens."""
    parser, first, tokens, done = SseParser(), None, 0, False
    try:
        async for chunk in response.content.iter_any():
            for event in parser.feed(chunk):
                first = first or time.perf_counter()
                done = done or event.data == DONE
                if b'"error"' in event.data or b'"usage"' in event.data:
                    tokens = max(tokens, _tokens(event.data))
    except EventTooLarge as error:
        raise BrokenAnswer(str(error)) from error
    if not done or first is None:
        raise BrokenAnswer("the stream ended without [DONE]")
    return first, tokens


async def _read_json(response: aiohttp.ClientResponse) -> tuple[float, int]:
    body = await response.read()
    return time.perf_counter(), _tokens(body)


def _tokens(data: bytes) -> int:
    """Completion tokens of an answer or a chunk, 0 without usage. Raises BrokenAnswer for an error in its place."""
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BrokenAnswer(f"not JSON: {data[:100].decode(errors='replace')}") from error
    if not isinstance(answer, dict) or answer.get("error"):
        raise BrokenAnswer(data[:200].decode(errors="replace"))
    usage = answer.get("usage") or {}
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


async def arrivals(requests: Iterator[Request], speed: float) -> AsyncIterator[Request]:
    """Hand out requests when their time has come: arrival times divided by speed, or at once with speed 0."""
    started, origin = time.monotonic(), None
    for request in requests:
        origin = request.arrival if origin is None else origin
        if speed > 0:
            await asyncio.sleep(started + (request.arrival - origin) / speed - time.monotonic())
        yield request


async def replay_pass(client: Client, requests: Iterator[Request], options: Options) -> Tally:
    """Send all requests once, at most `concurrency` at a time."""
    tally, started = Tally(), time.perf_counter()
    free = asyncio.Semaphore(options.concurrency)

    async def send(request: Request) -> None:
        try:
            tally.add(await client.send(request))
        finally:
            free.release()

    problem = None
    async with asyncio.TaskGroup() as group:
        try:
            async for request in arrivals(requests, options.speed):
                await free.acquire()
                group.create_task(send(request))
        except DataError as error:  # raised after what is under way has come back, and not as an ExceptionGroup
            problem = error
    if problem is not None:
        raise problem
    tally.seconds = time.perf_counter() - started
    return tally


async def replay(path: Path, options: Options, *, passes: int, limit: int | None) -> dict[str, Any]:
    """Replay a trace some times over. Raises DataError."""
    async with _session(options) as session:
        if not options.model:
            options = await _with_model(session, options)
        client = Client(session, options)
        tallies = [await replay_pass(client, islice(read_trace(path), limit), options) for _ in range(passes)]
    price = seconds_per_token(tallies)
    return {
        "file": str(path),
        "url": options.url,
        "model": options.model,
        "passes": [tally.report(price) for tally in tallies],
    }


def seconds_per_token(tallies: Sequence[Tally]) -> float | None:
    """What a generated token took over all passes; None when nothing was generated or no usage was told."""
    tokens = sum(tally.tokens["misses"] for tally in tallies)
    return sum(sum(tally.total["misses"]) for tally in tallies) / tokens if tokens else None


def _session(options: Options) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"authorization": f"Bearer {options.api_key}"} if options.api_key else {},
        timeout=aiohttp.ClientTimeout(total=options.timeout),
        connector=aiohttp.TCPConnector(limit=0),
    )


async def _with_model(session: aiohttp.ClientSession, options: Options) -> Options:
    """Take the first model the gateway names. Raises DataError."""
    try:
        async with session.get(f"{options.url}/models") as response:
            model = orjson.loads(await response.read())["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{options.url}/models names no model ({error!r}); say which with --model") from error
    return dataclasses.replace(options, model=str(model))


def table(summary: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{summary['file']} -> {summary['url']}, model {summary['model']}"]
    for number, result in enumerate(summary["passes"], 1):
        lines += ["", f"pass {number}: {result['requests']} requests in {result['seconds']:.1f} s"]
        lines += [f"  failures   {result['failures']}"]
        lines += [f"             {reason}" for reason in result["failure_reasons"]]
        hits = result["hits"]
        lines += [f"  hits       {hits['exact']} exact, {hits['semantic']} semantic; {hits['collapsed']} collapsed"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in result["miss_reasons"].items())
        lines += [f"  misses     {result['misses']}{f' ({reasons})' if reasons else ''}"]
        rate = result["hit_rate"]
        lines += [f"  hit rate   {'-' if rate is None else f'{rate:.1%}'}"]
        lines += [_latencies(group, figures) for group, figures in result["latency_ms"].items() if figures["total"]]
        seconds = result["seconds_saved"]
        spared = "" if seconds is None else f", about {seconds:.1f} s of generation"
        lines += [f"  saved      {result['tokens_saved']} tokens{spared}"]
    return "\n".join(lines)


def _latencies(group: str, figures: dict[str, dict[str, float]]) -> str:
    def row(name: str) -> str:
        return "/".join(f"{value:.1f}" for value in figures[name].values())

    return f"  {group:<10} {row('total')} ms to the end, {row('first_event')} ms to the first event (p50/p90/p99)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns 0 when every request was answered, 1 when one failed, 2 when the command line is wrong."""
    chosen = _parser().parse_args(arguments)
    try:
        summary = asyncio.run(replay(chosen.file, _options(chosen), passes=chosen.passes, limit=chosen.limit))
    except DataError as error:
        print(f"hitpath replay: {error}", file=sys.stderr)
        return 1
    print(orjson.dumps(summary).decode() if chosen.json else table(summary))
    return 1 if any(result["failures"] for result in summary["passes"]) else 0


def _options(chosen: argparse.Namespace) -> Options:
    base = chosen.url.rstrip("/")
    return Options(
        url=base if base.endswith("/v1") else f"{base}/v1",
        model=chosen.model or "",
        api_key=chosen.api_key or os.environ.get("HITPATH_API_KEY"),
        speed=chosen.speed,
        concurrency=chosen.concurrency or (CONCURRENCY_TIMED if chosen.speed else CONCURRENCY),
        max_tokens=chosen.max_tokens,
        stream=chosen.stream,
        timeout=chosen.timeout,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hitpath replay", description="Replay a trace with real text.")
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines with `prompt` or `input`, .gz too")
    parser.add_argument("--url", required=True, help="the gateway's, with or without /v1")
    parser.add_argument(
        "--speed", type=_not_negative, default=0.0, help="times as fast as recorded (default: no waiting)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--limit", type=_positive, help="only the first N rows")
    parser.add_argument("--model", help="default: the first one the gateway names")
    parser.add_argument("--api-key", help="default: HITPATH_API_KEY from the environment")
    parser.add_argument(
        "--concurrency", type=_positive, help=f"default: {CONCURRENCY}, with --speed {CONCURRENCY_TIMED}"
    )
    parser.add_argument("--max-tokens", type=_positive, help="of an answer; one cut off by it is not cached")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="default: stream")
    parser.add_argument("--passes", type=_positive, default=1, help="how often to replay (default: 1)")
    parser.add_argument(
        "--timeout", type=_not_negative, default=300.0, help="seconds a request may take (default: 300)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


if __name__ == "__main__":
    sys.exit(main())
