"""An engine without a model behind its HTTP: what each answer says is written beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import uvicorn
from tokenizers import AddedToken, Tokenizer

from engine.checkpoint import Checkpoint, load_checkpoint
from engine.errors import QueueFull
from engine.metrics import EngineMetrics, EngineState
from engine.runner import Event, Finished, Job, Progress, Prompted
from engine.sampling import Choice
from engine.server import Delivery, Engine
from tests.engine import checkpoints

NOTHING = EngineState(
    running=0, waiting=0, preemptions=0, free=1, cached=0, used=0, block_size=16, sheds=0, check_failures=0
)


def quiet_metrics() -> EngineMetrics:
    """Metrics of an engine that has no books."""
    return EngineMetrics("scripted", lambda: NOTHING, context=1000)


Script = Callable[[Job], Sequence[Event]]


class ScriptedRunner:
    """Delivers what the script says, one event of every job per step; never more than `room` jobs at once."""

    def __init__(self, script: Script, delivery: Delivery, room: int = 100) -> None:
        self._script, self._delivery, self._room = script, delivery, room
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []

    def start(self) -> None:
        pass

    def submit(self, jobs: Sequence[Job]) -> None:
        if len(jobs) > self._room:
            raise QueueFull(self._room)
        self.jobs += jobs
        left = [(job, list(self._script(job))) for job in jobs]
        while left:
            self._delivery([(job, events.pop(0)) for job, events in left if events])
            left = [(job, events) for job, events in left if events]

    def cancel(self, jobs: Sequence[Job]) -> None:
        self.cancelled += jobs

    def depth(self) -> tuple[int, int]:
        return len(self.jobs), 0

    def close(self) -> None:
        pass


def spoken(checkpoint: Checkpoint, text: str, *, cached: int = 0, scored: bool = False) -> list[Event]:
    """The events of an answer that says `text` and stops, a token at a time."""
    detokenizer = checkpoint.tokenizer.detokenizer()
    events: list[Event] = [Prompted(cached)]
    tokens = checkpoint.tokenizer.encode_text(text)
    for token in tokens:
        choice = Choice(token, -0.5, ((token, -0.5), (1, -2.0))) if scored else Choice(token)
        events.append(Progress(detokenizer.push(token), choice))
    return [*events, Finished("stop", detokenizer.flush(), len(tokens) + 1)]


def family(directory: Path, *added: AddedToken, template: str = checkpoints.TEMPLATE) -> Checkpoint:
    """A tiny checkpoint with these tokens and this chat template besides a token per byte."""
    checkpoints.write(directory, vocab_size=checkpoints.VOCABULARY + 6, max_position_embeddings=2048)
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(path))
    checkpoints.edit(directory / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    return load_checkpoint(directory, name="tiny")


@contextlib.asynccontextmanager
async def connected(engine: Engine) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client of an engine behind a port of its own."""
    server = uvicorn.Server(uvicorn.Config(engine.application(), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        try:
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


@contextlib.asynccontextmanager
async def scripted(
    checkpoint: Checkpoint, script: Script, *, room: int = 100
) -> AsyncIterator[tuple[openai.AsyncOpenAI, ScriptedRunner]]:
    """An engine that follows the script, and its client."""
    delivery = Delivery()
    runner = ScriptedRunner(script, delivery, room)
    async with connected(
        Engine(checkpoint, runner, context=1000, delivery=delivery, metrics=quiet_metrics())
    ) as client:
        yield client, runner


async def run(application: Any, scope: dict[str, Any], body: bytes, gone: asyncio.Event) -> list[dict[str, Any]]:
    """Call an ASGI application as a server does; the client leaves when `gone` is set. What was sent."""
    sent: list[dict[str, Any]] = []
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await gone.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await application({"type": "http", "method": "POST", "headers": [], "query_string": b"", **scope}, receive, send)
    return sent
