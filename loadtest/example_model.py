"""What examples for a cheaper model save: pairs of questions through a real gateway before two scripted backends.

Of each pair the one question is asked, then the other; both backends answer after a fixed time, the cheaper one sooner.
This measures how many calls of the expensive model turn into calls of the cheaper one, and what that does to the time
to an answer. Whether the cheaper model's answers are good enough only a real model can tell.

python -m loadtest.example_model FILE... [--pairs N] [--similarity X] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import aiohttp
import orjson
import uvicorn

from gateway.app import open_gateway
from gateway.server import server_config
from gateway.settings import validate
from loadtest.data import DataError
from loadtest.evaluate import Pair, read_pairs
from loadtest.scripted import Pace, ScriptedBackend

LARGE, SMALL = 0.4, 0.1
"""Seconds that the two backends take."""
TOKENS = 64


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the second questions."""

    asked: int
    served: float
    """Share answered from the cache."""
    shown: float
    """Share that the cheaper model answered with an example."""
    asked_anew: float
    """Share that the expensive model answered."""
    seconds: dict[str, float]
    """Mean time to a whole answer, by outcome."""
    without: float
    """Mean time to an answer if what was shown had gone to the expensive model."""
    mean: float
    """Mean time to an answer as it was."""


async def measure(pairs: Sequence[Pair], similarity: float) -> Report:
    """Ask all pairs, each in a namespace of its own."""
    took: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            large = await stack.enter_async_context(_listening(ScriptedBackend(Pace(TOKENS, LARGE))))
            small = await stack.enter_async_context(_listening(ScriptedBackend(Pace(TOKENS, SMALL))))
            gateway = await stack.enter_async_context(open_gateway(_settings(Path(folder), large, small, similarity)))
            await gateway.store.loaded.wait()
            url = await stack.enter_async_context(_listening(gateway.app))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            for number, pair in enumerate(pairs):
                await _ask(session, url, pair.a, number)
                outcome, seconds = await _ask(session, url, pair.b, number)
                took[outcome].append(seconds)
    return _report(took)


def _report(took: dict[str, list[float]]) -> Report:
    asked = sum(map(len, took.values()))
    every = [seconds for outcome in took.values() for seconds in outcome]
    slower = len(took["shown"]) * (fmean(took["large"] or [LARGE]) - fmean(took["shown"] or [SMALL]))
    return Report(
        asked=asked,
        served=len(took["served"]) / asked,
        shown=len(took["shown"]) / asked,
        asked_anew=len(took["large"]) / asked,
        seconds={name: round(fmean(times), 4) for name, times in sorted(took.items()) if times},
        without=(sum(every) + slower) / asked,
        mean=fmean(every),
    )


async def _ask(session: aiohttp.ClientSession, url: str, text: str, number: int) -> tuple[str, float]:
    body = orjson.dumps({"model": "large", "messages": [{"role": "user", "content": text}]})
    headers = {"content-type": "application/json", "x-hitpath-namespace": f"pair-{number}"}
    started = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as response:
        response.raise_for_status()
        await response.read()
        seconds = time.perf_counter() - started
        if "; hit;" in response.headers["cache-status"]:
            return "served", seconds
        return ("shown" if response.headers["x-hitpath-upstream"] == "small" else "large"), seconds


def _settings(folder: Path, large: str, small: str, similarity: float) -> Any:
    upstreams = [
        {"name": "large", "kind": "openai", "url": f"{large}/v1", "models": ["large"]},
        {"name": "small", "kind": "openai", "url": f"{small}/v1", "models": ["small"]},
    ]
    cache = {
        "default": {"example": {"model": "small", "similarity": similarity}},
        "judge": {"kind": "pair", "on_missing": "threshold"},
    }
    return validate({"data_dir": folder, "upstreams": upstreams, "cache": cache}, source="example_model")


@asynccontextmanager
async def _listening(app: Any) -> AsyncIterator[str]:
    """Serve an application on a port of the kernel's choice."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app))
    running = asyncio.create_task(server._serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of each file."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.example_model", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=200, help="of each file")
    parser.add_argument("--similarity", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    reports: dict[str, Any] = {}
    for file in options.files:
        try:
            pairs = read_pairs(file)
        except DataError as error:
            print(error, file=sys.stderr)
            return 1
        chosen = Random(options.seed).sample(pairs, min(options.pairs, len(pairs)))
        reports[str(file)] = asdict(asyncio.run(measure(chosen, options.similarity)))
    if options.json:
        print(orjson.dumps(reports).decode())
        return 0
    for name, report in reports.items():
        print(name)
        for key, value in report.items():
            print(f"  {key}: {value if isinstance(value, dict | int) else f'{value:.3f}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
