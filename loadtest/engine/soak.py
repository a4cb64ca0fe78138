"""Half an hour of everything at once: is each request answered or refused, and is the engine as it was before?

`python -m loadtest.engine.soak [--minutes 30] [--model DIR] [--json]` starts an engine with little memory and a short
queue, and lets clients of several tenants ask it for whole answers and streams over shared prefixes, go away in the
middle, send prompts that are too long and bodies that are wrong, and come in bursts. Exit codes: 0 everything holds, 1
something does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from loadtest.bench_client import BenchError
from loadtest.engine.process import Served, serving

_MiB = 2**20
_PATIENCE = 120.0
"""Seconds after which an answer counts as lost."""
_SETTLE = 60.0
"""Seconds the engine may take to become idle in the end."""
_SAMPLE = 2.0
_TENANTS = 5
_PREFIXES = 8
_WARM_SHARE = 1 / 3
"""Of the time; memory is judged on the rest, when buffers and caches have their size."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much, and how little room for it."""

    minutes: float = 30.0
    clients: int = 12
    burst: int = 60
    """Requests at once, now and then: more than may run and wait."""
    pause: float = 15.0
    """Seconds between bursts."""
    seed: int = 0
    engine: tuple[str, ...] = (
        "--max-running",
        "8",
        "--max-waiting",
        "24",
        "--kv-memory",
        "24MiB",
        "--token-budget",
        "128",
    )
    growth: float = 0.5
    """Most MiB per minute that memory may grow."""


@dataclass(slots=True)
class Tally:
    """What came of all requests."""

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    """What must not happen, the first few."""

    def wrong(self, problem: str) -> None:
        """Keep a problem."""
        self.outcomes["wrong"] += 1
        if len(self.problems) < 20:
            self.problems.append(problem)


@dataclass(frozen=True, slots=True)
class Report:
    """The verdict and what it rests on."""

    minutes: float
    sent: int
    outcomes: dict[str, int]
    problems: tuple[str, ...]
    lost: int
    """Requests that were neither answered nor refused, nor given up by the client."""
    memory_mib: tuple[float, float]
    """When warm, and in the end."""
    growth: float
    """MiB per minute."""
    allowed_growth: float
    blocks: dict[str, int]
    """After the last answer, by state; `total` is what there is."""
    preemptions: int
    cached_tokens: int
    check_failures: int

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words."""
        found = list(self.problems)
        if self.lost:
            found.append(f"{self.lost} of {self.sent} requests were lost")
        if self.growth > self.allowed_growth:
            found.append(f"memory grows by {self.growth:.2f} MiB a minute")
        if self.blocks["free"] + self.blocks["cached"] != self.blocks["total"]:
            found.append(f"blocks leaked: {self.blocks}")
        if self.check_failures:
            found.append(f"the blocks' books were wrong {self.check_failures} times")
        return found


class Client:
    """Asks for all kinds of things and knows what each may come to."""

    def __init__(self, session: aiohttp.ClientSession, load: Load, tally: Tally, context: int) -> None:
        self._session, self._tally, self._context = session, tally, context
        self._random = random.Random(load.seed)
        self._prefixes = [self._words(self._random.randint(20, 150)) for _ in range(_PREFIXES)]
        self._kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.whole, 30),
            (self.streamed, 30),
            (self.leave_stream, 15),
            (self.leave_whole, 10),
            (self.oversize, 5),
            (self.malformed, 10),
        ]

    async def one(self) -> None:
        """One request of a random kind."""
        calls, weights = zip(*self._kinds, strict=True)
        call = self._random.choices(calls, weights)[0]
        self._tally.sent += 1
        try:
            await asyncio.wait_for(call(), _PATIENCE)
        except TimeoutError:
            self._tally.outcomes["lost"] += 1
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            self._tally.wrong(f"{call.__name__}: {type(error).__name__}: {error}")

    async def whole(self) -> None:
        """A whole answer."""
        path, body = self._asked()
        async with self._post(path, body) as response:
            answer = await response.json()
        if not self._refused(response.status):
            self._check_usage(answer["usage"], body)

    async def streamed(self) -> None:
        """A stream, read to its end."""
        path, body = self._asked()
        async with self._post(path, body | {"stream": True, "stream_options": {"include_usage": True}}) as response:
            lines = [line.strip() async for line in response.content if line.strip()]
        if self._refused(response.status):
            return
        if lines[-1] != b"data: [DONE]":
            raise ValueError(f"a stream ended with {lines[-1]!r}")
        self._check_usage(json.loads(lines[-2].removeprefix(b"data: "))["usage"], body)

    async def leave_stream(self) -> None:
        """A stream whose client goes away after a few events."""
        path, body = self._asked()
        async with self._post(path, body | {"stream": True}) as response:
            if self._refused(response.status):
                return
            for _ in range(self._random.randint(0, 20)):
                await response.content.readline()
            response.close()
        self._tally.outcomes["given up"] += 1

    async def leave_whole(self) -> None:
        """A whole answer whose client does not wait for it."""
        path, body = self._asked()
        try:
            async with asyncio.timeout(self._random.uniform(0.001, 0.5)), self._post(path, body) as response:
                await response.read()
        except TimeoutError:
            self._tally.outcomes["given up"] += 1
            return
        if not self._refused(response.status):
            self._tally.outcomes["answered"] += 1

    async def oversize(self) -> None:
        """A prompt that does not fit."""
        prompt = [7] * self._random.randint(self._context, 2 * self._context)
        await self._expect({"prompt": prompt}, 400)

    async def malformed(self) -> None:
        """A body that no answer can be given to."""
        bodies: list[tuple[Any, int]] = [
            ({"prompt": "x", "temperature": 9}, 400),
            ({"prompt": "x", "max_tokens": "many"}, 400),
            ({"prompt": [10**9]}, 400),
            ({"prompt": []}, 400),
            ({"prompt": "x", "model": "another"}, 404),
            ({"prompt": "x", "no_such_field": 1}, 400),
            ([], 400),
        ]
        await self._expect(*self._random.choice(bodies))

    async def _expect(self, body: Any, status: int) -> None:
        async with self._post("/v1/completions", body) as response:
            answer = await response.json()
        if response.status != status or "message" not in answer["error"]:
            raise ValueError(f"{status} was due, came {response.status}: {answer}")
        self._tally.outcomes["refused: wrong"] += 1

    def _post(self, path: str, body: Any) -> Any:
        tenant = f"tenant-{self._random.randrange(_TENANTS)}"
        return self._session.post(path, json=body, headers={"authorization": f"Bearer {tenant}"})

    def _refused(self, status: int) -> bool:
        if status == 429:
            self._tally.outcomes["refused: full"] += 1
            return True
        if status != 200:
            raise ValueError(f"status {status}")
        return False

    def _check_usage(self, usage: dict[str, Any], body: dict[str, Any]) -> None:
        count = usage["completion_tokens"]
        if not 1 <= count <= body["max_tokens"] * body["n"]:
            raise ValueError(f"{count} tokens were drawn for {body['max_tokens']} times {body['n']}")
        self._tally.outcomes["answered"] += 1

    def _asked(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        text = draw.choice(self._prefixes) + " " + self._words(draw.randint(1, 60))
        body: dict[str, Any] = {
            "max_tokens": draw.choice((1, 8, 32, 100)),
            "temperature": draw.choice((0, 1)),
            "n": draw.choice((1, 1, 1, 2)),
            "ignore_eos": draw.random() < 0.5,
        }
        if draw.random() < 0.5:
            return "/v1/completions", body | {"prompt": text}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}

    def _words(self, count: int) -> str:
        return " ".join("".join(self._random.choices("abcdefghij", k=4)) for _ in range(count))


async def soak(served: Served, load: Load) -> Report:
    """Load a running engine, let it come to rest, and look."""
    tally = Tally()
    ends = time.monotonic() + load.minutes * 60
    samples: list[tuple[float, float]] = []
    options: dict[str, Any] = {
        "connector": aiohttp.TCPConnector(limit=0),
        "timeout": aiohttp.ClientTimeout(None),
        "base_url": served.url,
    }
    async with aiohttp.ClientSession(**options) as session:
        async with session.get("/v1/models") as response:
            context = (await response.json())["data"][0]["max_model_len"]
        client = Client(session, load, tally, context)
        async with asyncio.TaskGroup() as group:
            group.create_task(_watch(served, samples, ends))
            group.create_task(_bursts(client, load, ends))
            for _ in range(load.clients):
                group.create_task(_ask(client, ends))
        figures = await _at_rest(session)
    return _report(load, tally, samples, figures)


async def _ask(client: Client, ends: float) -> None:
    while time.monotonic() < ends:
        await client.one()


async def _bursts(client: Client, load: Load, ends: float) -> None:
    while time.monotonic() < ends:
        await asyncio.gather(*(client.one() for _ in range(load.burst)))
        await asyncio.sleep(min(load.pause, max(0.0, ends - time.monotonic())))


async def _watch(served: Served, samples: list[tuple[float, float]], ends: float) -> None:
    """Seconds and MiB, every now and then."""
    while time.monotonic() < ends:
        if served.process.poll() is not None:
            raise BenchError(f"the engine ended with exit code {served.process.returncode}")
        samples.append((time.monotonic(), served.resident() / _MiB))
        await asyncio.sleep(min(_SAMPLE, max(0.0, ends - time.monotonic())))


async def _at_rest(session: aiohttp.ClientSession) -> dict[str, float]:
    """The engine's figures when it has nothing to do, and has had the time to check its books. Raises BenchError."""
    deadline = time.monotonic() + _SETTLE
    while True:
        figures = await _figures(session)
        if figures["hitpath_engine_running"] == figures["hitpath_engine_waiting"] == 0:
            await asyncio.sleep(2)  # it checks its books a second after the last step
            return await _figures(session)
        if time.monotonic() > deadline:
            raise BenchError(f"the engine still works a minute after the last request: {figures}")
        await asyncio.sleep(0.2)


async def _figures(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    figures: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            figures[sample.name + sample.labels.get("state", "")] = sample.value
    return figures


def _report(load: Load, tally: Tally, samples: Sequence[tuple[float, float]], figures: dict[str, float]) -> Report:
    judged = np.array(samples[int(len(samples) * _WARM_SHARE) :])
    slope = float(np.polyfit(judged[:, 0], judged[:, 1], 1)[0]) if len(judged) > 1 else 0.0
    blocks = {state: int(figures[f"hitpath_engine_blocks{state}"]) for state in ("free", "cached", "used")}
    return Report(
        minutes=load.minutes,
        sent=tally.sent,
        outcomes=dict(tally.outcomes),
        problems=tuple(tally.problems),
        lost=tally.sent - sum(tally.outcomes.values()) + tally.outcomes["lost"],
        memory_mib=(float(judged[0, 1]), float(judged[-1, 1])),
        growth=slope * 60,
        allowed_growth=load.growth,
        blocks=blocks | {"total": int(figures["hitpath_engine_block_capacity"])},
        preemptions=int(figures["vllm:num_preemptions_total"]),
        cached_tokens=int(figures["vllm:prefix_cache_hits_total"]),
        check_failures=int(figures["hitpath_engine_check_failures_total"]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    load = Load(minutes=options.minutes, seed=options.seed)
    try:
        with serving("--model", options.model, *load.engine) as served:
            report = asyncio.run(soak(served, load))
    except BenchError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(asdict(report) | {"failures": report.failures}, indent=2))
    else:
        for name, value in asdict(report).items():
            print(f"{name}: {value}")
        print("everything holds" if not report.failures else "DOES NOT HOLD: " + "; ".join(report.failures))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
