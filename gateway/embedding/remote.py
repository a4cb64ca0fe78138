"""An OpenAI-compatible `/embeddings` endpoint as the embedder."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import deque
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
import orjson

from cachestore.entry import Vector
from gateway.embedding import EmbedderError, Embedding

MAX_BATCH = 32
MAX_REQUESTS = 4
"""Requests in flight; what arrives while all are busy goes together."""
MAX_WAITING = 2048
PROBE = "dimension"

_Waiter = tuple[str, "asyncio.Future[Embedding]"]


class RemoteEmbedder:
    """Belongs to the event loop it was opened in. Make it with `open`."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str, model: str) -> None:
        self._session = session
        self._endpoint = endpoint
        self._model = model
        self._waiting: deque[_Waiter] = deque()
        self._requests: set[asyncio.Task[None]] = set()
        self._closed = False
        self.dim = 0
        self.identity = ""

    @classmethod
    async def open(
        cls,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 5.0,  # noqa: ASYNC109 - the limit of every later request, not of this call
    ) -> RemoteEmbedder:
        """Ask for one vector to learn its dimension; `url` ends before `/embeddings`. Raises EmbedderError."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=timeout))
        endpoint = url.rstrip("/") + "/embeddings"
        embedder = cls(session, endpoint, model)
        try:
            embedder.dim = len((await embedder._ask([PROBE]))[0].vector)
        except BaseException:
            await session.close()
            raise
        embedder.identity = f"{endpoint}/{model}/{embedder.dim}"
        return embedder

    async def embed(self, text: str) -> Embedding:
        """Embed one text; concurrent calls share requests. Raises EmbedderError."""
        if self._closed:
            raise EmbedderError("the embedder is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise EmbedderError(f"{MAX_WAITING} texts wait for the embedder already")
        future: asyncio.Future[Embedding] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if len(self._requests) < MAX_REQUESTS:
            task = asyncio.create_task(self._work())
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)
        return await future

    async def close(self) -> None:
        """Finish what was accepted, then give the connections back."""
        self._closed = True
        await asyncio.gather(*self._requests)
        await self._session.close()

    async def _work(self) -> None:
        while batch := self._take():
            for (_, future), answer in zip(batch, await self._answers(batch), strict=True):
                if future.done():
                    continue
                if isinstance(answer, EmbedderError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _take(self) -> list[_Waiter]:
        batch: list[_Waiter] = []
        while self._waiting and len(batch) < MAX_BATCH:
            waiter = self._waiting.popleft()
            if not waiter[1].cancelled():
                batch.append(waiter)
        return batch

    async def _answers(self, batch: Sequence[_Waiter]) -> Sequence[Embedding | EmbedderError]:
        try:
            return await self._ask([text for text, _ in batch])
        except _Refused as error:
            # A backend refuses a whole batch for one text that is too long; the others must not pay for it.
            if len(batch) == 1:
                return [error]
            return [answer for waiter in batch for answer in await self._answers([waiter])]
        except EmbedderError as error:
            return [error] * len(batch)

    async def _ask(self, texts: Sequence[str]) -> list[Embedding]:
        vectors = parse(await self._post(texts), len(texts))
        if self.dim and any(len(vector) != self.dim for vector in vectors):
            raise EmbedderError(f"{self._endpoint}: a vector is not of {self.dim} dimensions any more")
        return [Embedding(vector=vector, truncated=False) for vector in vectors]

    async def _post(self, texts: Sequence[str]) -> bytes:
        try:
            body = orjson.dumps({"model": self._model, "input": texts, "encoding_format": "base64"})
        except orjson.JSONEncodeError as error:  # lone surrogates
            raise _Refused(f"a text is not Unicode: {error}") from error
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(self._endpoint, data=body, headers=headers) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EmbedderError(f"{self._endpoint}: {str(error) or type(error).__name__}") from error
        if response.status == 200:
            return answer
        kind = _Refused if response.status in (400, 413, 422) else EmbedderError
        raise kind(f"{self._endpoint}: status {response.status}: {answer[:200].decode(errors='replace')}")


class _Refused(EmbedderError):
    """The backend answered, and what it did not like may be one text of the batch."""


def parse(body: bytes, count: int) -> list[Vector]:
    """Read an answer's vectors, floats or base64, in the order of the inputs, at unit length. Raises EmbedderError."""
    try:
        items = orjson.loads(body)["data"]
        vectors = {int(item["index"]): _vector(item["embedding"]) for item in items}
        return [vectors[index] for index in range(count)]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise EmbedderError(f"the answer is not a list of {count} embeddings: {error!r}") from error


def _vector(value: Any) -> Vector:
    raw = np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else value
    vector = np.array(raw, np.float64)
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(vector))
    if vector.ndim != 1 or not np.isfinite(length) or length == 0.0:
        raise ValueError("not a vector with a direction")
    return (vector / length).astype(np.float32)
