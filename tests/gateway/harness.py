"""A real gateway on a real socket in the test's own event loop, in front of a scripted backend."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvicorn

from gateway.app import Gateway, open_gateway
from gateway.server import server_config
from gateway.settings import Settings, validate
from tests.fakes import ScriptedUpstream

ADMIN_KEY = "only-for-tests"


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def cache(self) -> str:
        return self.headers.get("cache-status", "")

    def json(self) -> Any:
        return orjson.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON payloads of a stream."""
        payloads = [line.removeprefix(b"data: ") for line in self.body.splitlines() if line.startswith(b"data: ")]
        return [orjson.loads(payload) for payload in payloads if payload != b"[DONE]"]

    @property
    def text(self) -> str:
        """What the model said, whichever form the answer has."""
        if self.headers["content-type"].startswith("text/event-stream"):
            choices = [choice for event in self.events() for choice in event["choices"]]
            return "".join(choice["delta"].get("content") or "" for choice in choices)
        return str(self.json()["choices"][0]["message"]["content"])


class Client:
    """Asks a gateway; `gateway` is the open one behind it."""

    def __init__(self, url: str, session: aiohttp.ClientSession, gateway: Gateway) -> None:
        self.url = url
        self.session = session
        self.gateway = gateway

    async def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, data: Any = None) -> Answer:
        async with self.session.request(method, self.url + path, headers=headers, data=data) as response:
            body = await response.read()
            return Answer(response.status, {name.lower(): value for name, value in response.headers.items()}, body)

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data: Any = body if isinstance(body, bytes) else orjson.dumps(body)
        if len(data) > 2**20:
            data = io.BytesIO(data)  # the client warns of larger bytes
        return await self.ask("POST", path, headers={"content-type": "application/json", **named}, data=data)

    async def chat(
        self, text: str, *, stream: bool = False, fields: dict[str, Any] | None = None, **headers: str
    ) -> Answer:
        return await self.post("/v1/chat/completions", chat_body(text, stream=stream, **(fields or {})), **headers)


def chat_body(text: str, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
    return {**body, "stream": True} if stream else body


def settings_for(data_dir: Path, *upstreams: ScriptedUpstream | str, **groups: Any) -> Settings:
    """Settings in front of the backends given, nothing compared by meaning unless `cache` says so.

    No budget is kept unless `cache` says so either: checks would ask the backend whenever chance says so.
    """
    urls = [upstream if isinstance(upstream, str) else upstream.url for upstream in upstreams]
    named = [{"name": f"up{number}", "kind": "openai", "url": url} for number, url in enumerate(urls)]
    cache = {"embedder": {"kind": "none"}, "budgets": {"keep": False}, **groups.pop("cache", {})}
    return validate({"data_dir": data_dir, "upstreams": named, "cache": cache, **groups}, source="test")


def comparing(data_dir: Path, built: Path, *upstreams: ScriptedUpstream, **groups: Any) -> Settings:
    """Settings with the local embedder, whose file is built already, and similarity as the only judge."""
    if not (data_dir / "cache").exists():
        (data_dir / "cache").symlink_to(built / "cache", target_is_directory=True)
    alone = {"judge": {"kind": "threshold"}, "budgets": {"keep": False}}
    cache = {"embedder": {"kind": "local"}, **alone, **groups.pop("cache", {})}
    return settings_for(data_dir, *upstreams, cache=cache, **groups)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Client]:
    """Run a gateway for the length of a block, and see that nothing is left behind."""
    async with open_gateway(settings) as gateway:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(server_config(gateway.app))
        running = asyncio.create_task(server._serve(sockets=[listener]))
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with aiohttp.ClientSession() as session:
                await gateway.store.loaded.wait()
                yield Client(url, session, gateway)
                assert await gateway.store.check() == []
        finally:
            server.should_exit = True
            await running
