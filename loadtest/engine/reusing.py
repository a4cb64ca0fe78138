"""What the benchmarks of chunk reuse share: an operating point, texts of so many tokens, and a client of the engine."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.reuse.point import Dtype, Loss, OperatingPoint, SelectorName, Stored
from engine.tokenizer import ChatTokenizer
from loadtest.bench_client import BenchError

_PATIENCE = 300.0
"""Seconds after which an answer counts as lost."""
_BUSY = ("running", "waiting", "reuse_background_jobs", "kv_writing_bytes", "kv_waiting_orders")
"""Figures of an engine that has something to do."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How chunks are reused in a benchmark: a point that needs no calibration, since only its cost is of interest."""

    selector: SelectorName = "sensitive"
    ratio: float = 0.15
    stored: Stored = "mean"
    codec: str = "int8"
    check_share: float = 0.0

    def point(self, checkpoint: Checkpoint) -> OperatingPoint:
        """For this model. It is never switched off by its own checks."""
        return OperatingPoint(
            model=checkpoint.fingerprint,
            dtype=cast(Dtype, str(checkpoint.dtype).removeprefix("torch.")),
            selector=self.selector,
            ratio=self.ratio,
            stored=self.stored,
            codec=self.codec,
            loss=Loss(0.0, 1.0, 0.4),
            most_loss=100.0,
            least_agreement=0.01,
            check_share=self.check_share,
        )


def model_of(model: str, dtype: str) -> tuple[Path, Checkpoint]:
    """Where it lies, and the model as the engine loads it. Raises CheckpointError."""
    directory = BUNDLED if model == "bundled" else Path(model)
    return directory, load_checkpoint(directory, name=directory.name, dtype=dtype)


class Texts:
    """Texts of plain words that no other one repeats."""

    def __init__(self, tokenizer: ChatTokenizer, size: int, seed: int = 0) -> None:
        """`size`: tokens of the vocabulary."""
        self._tokenizer, self._random = tokenizer, random.Random(seed)
        pieces = (tokenizer.decode([token]) for token in range(size))
        self._words = [
            piece for piece in pieces if piece.startswith(" ") and piece[1:].isascii() and piece[1:].isalpha()
        ]
        if len(self._words) < 50:
            raise BenchError("the tokenizer has too few words to write texts with")

    def text(self, tokens: int) -> str:
        """One of as many tokens, or a few less."""
        text = "".join(self._random.choices(self._words, k=tokens + 8)).strip()
        _, offsets = self._tokenizer.encode_offsets(text)
        return text[: offsets[tokens - 1][1]] if len(offsets) > tokens else text


def asked(head: str, chunks: Sequence[str], question: str) -> dict[str, Any]:
    """A chat whose user's message has a text part for each chunk; `head` is the system's."""
    parts = [{"type": "text", "text": text + "\n\n"} for text in (*chunks, question)]
    messages = [{"role": "system", "content": head}, {"role": "user", "content": parts}]
    return {"messages": messages, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Heard:
    """One streamed answer."""

    first: float
    """Seconds to its first token."""
    text: str
    prompt: int
    """Tokens, as are all of these."""
    cached: int
    prefix: int
    chunks: int
    recomputed: int
    tier: str


class Asker:
    """A connection to one engine."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, body: dict[str, Any], tokens: int = 1) -> Heard:
        """Stream an answer. Raises BenchError for a failed one."""
        sent = {**body, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        async with self._session.post("/v1/chat/completions", json=sent) as response:
            if response.status != 200:
                raise BenchError(f"the engine answered {response.status}: {await response.text()}")
            said = dict(part.split("=") for part in response.headers["x-hitpath-kv"].split("; "))
            first, text, usage = await _read(response, began)
        return Heard(
            first=first,
            text=text,
            prompt=usage["prompt_tokens"],
            cached=usage["prompt_tokens_details"]["cached_tokens"],
            prefix=int(said["prefix"]),
            chunks=int(said["chunks"]),
            recomputed=int(said["recomputed"]),
            tier=said["tier"],
        )

    async def figures(self) -> dict[str, float]:
        """What `/metrics` says; a sample's labels follow its name."""
        async with self._session.get("/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        return {
            sample.name + "".join(sample.labels.values()): sample.value for one in families for sample in one.samples
        }

    async def quiet(self, patience: float = _PATIENCE) -> dict[str, float]:
        """Wait until the engine has nothing to do, not even in the background. Raises BenchError."""
        until = time.monotonic() + patience
        while True:
            now = await self.figures()
            if not any(now.get(f"hitpath_engine_{name}", 0.0) for name in _BUSY):
                return now
            if time.monotonic() > until:
                raise BenchError(f"the engine still works after {patience:.0f} s: {now}")
            await asyncio.sleep(0.1)


async def _read(response: aiohttp.ClientResponse, began: float) -> tuple[float, str, dict[str, Any]]:
    """Seconds to the first piece of text, all text, and the usage."""
    first, text, usage = 0.0, [], None
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise BenchError(f"a stream broke: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if choice["finish_reason"] is not None or choice["delta"].get("content"):
                first = first or time.perf_counter() - began
                text.append(choice["delta"].get("content") or "")
    if usage is None:
        raise BenchError("a stream ended without usage")
    return first, "".join(text), usage


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[Asker]:
    """A client of the engine at `url`."""
    timeout = aiohttp.ClientTimeout(_PATIENCE)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Asker(session)
