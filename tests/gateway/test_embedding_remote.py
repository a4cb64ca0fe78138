import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import orjson
import pytest
from aiohttp import web

from gateway.embedding import EmbedderError, Embedding
from gateway.embedding.remote import MAX_REQUESTS, RemoteEmbedder, parse

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Endpoint:
    """Embeds a text as (its length, 1, 0); can be told to misbehave."""

    def __init__(self) -> None:
        self.inputs: list[list[str]] = []
        self.authorization: str | None = None
        self.floats = False
        self.status = 200
        self.dim = 3
        self.free = asyncio.Event()
        self.free.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.inputs.append(body["input"])
        self.authorization = request.headers.get("authorization")
        await self.free.wait()
        if self.status != 200:
            return web.Response(status=self.status, text="overloaded")
        if "too long" in body["input"]:
            return web.Response(status=400, text="too long")
        data = [{"index": index, "embedding": self._embedding(text)} for index, text in enumerate(body["input"])]
        return web.Response(body=orjson.dumps({"data": data[::-1], "model": body["model"]}))

    def _embedding(self, text: str) -> str | list[float]:
        vector = [float(len(text)), 1.0] + [0.0] * (self.dim - 2)
        return vector if self.floats else base64.b64encode(np.array(vector, "<f4").tobytes()).decode()


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/embeddings", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def opened(endpoint: Endpoint, *, timeout: float = 5.0) -> AsyncIterator[RemoteEmbedder]:  # noqa: ASYNC109
    async with served(endpoint.answer) as url:
        embedder = await RemoteEmbedder.open(url, "embed-1", api_key="k", timeout=timeout)
        try:
            yield embedder
        finally:
            endpoint.free.set()
            await embedder.close()


@pytest.mark.parametrize("floats", [True, False], ids=["floats", "base64"])
async def test_reads_unit_vectors_in_order(floats: bool) -> None:
    endpoint = Endpoint()
    endpoint.floats = floats
    async with opened(endpoint) as embedder:
        assert embedder.dim == 3
        assert embedder.identity.endswith("/v1/embeddings/embed-1/3")
        assert endpoint.authorization == "Bearer k"
        found = await asyncio.gather(*(embedder.embed("x" * size) for size in range(1, 20)))
        for size, embedding in enumerate(found, 1):
            np.testing.assert_allclose(embedding.vector, np.array([size, 1, 0]) / np.hypot(size, 1), atol=1e-6)


async def test_what_arrives_while_all_requests_are_busy_goes_together() -> None:
    endpoint = Endpoint()
    async with opened(endpoint) as embedder:
        endpoint.inputs.clear()
        endpoint.free.clear()
        tasks = []
        for busy in range(1, MAX_REQUESTS + 1):
            tasks.append(asyncio.create_task(embedder.embed("x" * busy)))
            async with asyncio.timeout(10):
                while len(endpoint.inputs) < busy:
                    await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(embedder.embed("y" * size)) for size in range(1, 17)]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        endpoint.free.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(answer, Embedding) for answer in found] == [True] * 19 + [False]
        assert [len(inputs) for inputs in endpoint.inputs] == [1] * MAX_REQUESTS + [15]


async def test_one_text_that_is_refused_costs_the_others_nothing() -> None:
    endpoint = Endpoint()
    async with opened(endpoint) as embedder:
        texts = [*"abcdefgh", "too long", *"ijkl"]
        found = await asyncio.gather(*(embedder.embed(text) for text in texts), return_exceptions=True)
        assert [text for text, answer in zip(texts, found, strict=True) if isinstance(answer, EmbedderError)] == [
            "too long"
        ]


async def test_failures_are_embedder_errors() -> None:
    endpoint = Endpoint()
    async with opened(endpoint, timeout=0.3) as embedder:
        with pytest.raises(EmbedderError, match="Unicode"):
            await embedder.embed("\ud800")
        endpoint.status = 503
        with pytest.raises(EmbedderError, match="status 503: overloaded"):
            await embedder.embed("a")
        endpoint.status = 200
        endpoint.dim = 4
        with pytest.raises(EmbedderError, match="not of 3 dimensions"):
            await embedder.embed("a")
        endpoint.free.clear()
        with pytest.raises(EmbedderError, match="TimeoutError"):
            await embedder.embed("a")


async def test_nobody_there_is_an_embedder_error_at_open() -> None:
    with pytest.raises(EmbedderError, match=r"127\.0\.0\.1:9"):
        await RemoteEmbedder.open("http://127.0.0.1:9/v1", "embed-1")


async def test_closed_refuses() -> None:
    async with opened(Endpoint()) as embedder:
        await embedder.close()
        with pytest.raises(EmbedderError, match="closed"):
            await embedder.embed("a")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"data": null}',
        b'{"data": []}',
        b'{"data": [{"index": 1, "embedding": [1.0]}]}',
        b'{"data": [{"index": 0, "embedding": [0.0, 0.0]}]}',
        b'{"data": [{"index": 0, "embedding": "abc"}]}',
        b'{"data": [{"index": 0, "embedding": {"a": 1}}]}',
        b'{"data": [{"index": 0, "embedding": [[1.0]]}]}',
        b'{"data": [{"index": 0, "embedding": [1e308, 1e308]}]}',
    ],
)
def test_an_answer_that_is_no_embedding_is_an_error(body: bytes) -> None:
    with pytest.raises(EmbedderError, match="not a list of 1"):
        parse(body, 1)
