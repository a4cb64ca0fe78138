"""What is replayed and how errors are told, as the official client reads it from a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from openai import APIError, AsyncOpenAI

from gateway.wire.endpoints import WIRES
from gateway.wire.errors import error_event
from loadtest.scripted import STREAM_TYPE, Pace, answer_text, respond
from tests.fakes import Part, Reply, ScriptedUpstream

ERROR = {"message": "the backend died", "type": "server_error", "param": None, "code": "upstream_died"}
USER: Any = {"role": "user", "content": "what?"}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}


def stored(endpoint: str) -> bytes:
    asked = {"model": "m", "messages": [USER], "prompt": "what?", "input": "what?"}
    return b"".join(respond(PATHS[endpoint], orjson.dumps(asked), Pace()).parts)


def replayed(endpoint: str) -> list[bytes]:
    return list(WIRES[endpoint].replay(stored(endpoint), include_usage=True))


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def client(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as client:
        yield client


def stream(*parts: Part) -> Reply:
    return Reply(parts, headers={"content-type": STREAM_TYPE})


async def test_a_replayed_chat(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(stream(*replayed("chat")))
    async with client.chat.completions.stream(model="m", messages=[USER]) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.content == answer_text("m", "what?")
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == 16


async def test_a_replayed_completion(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(stream(*replayed("completions")))
    chunks = [chunk async for chunk in await client.completions.create(model="m", prompt="what?", stream=True)]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer_text("m", "what?")
    assert chunks[-1].usage is not None


async def test_a_replayed_response(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(stream(*replayed("responses")))
    async with client.responses.stream(model="m", input="what?") as events:
        deltas = [event.delta async for event in events if event.type == "response.output_text.delta"]
        final = await events.get_final_response()
    assert "".join(deltas) == final.output_text == answer_text("m", "what?")


@pytest.mark.parametrize("endpoint", PATHS)
async def test_an_error_in_mid_stream_is_raised(endpoint: str, client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(stream(replayed(endpoint)[0], error_event(endpoint, ERROR, sequence_number=1)))
    seen: list[Any] = []
    with pytest.raises(APIError) as caught:
        await _read(client, endpoint, seen)
    assert len(seen) == 1
    assert caught.value.message == "the backend died"
    assert caught.value.code == "upstream_died"
    assert caught.value.body == ERROR


async def _read(client: AsyncOpenAI, endpoint: str, seen: list[Any]) -> None:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "chat": lambda: client.chat.completions.create(model="m", messages=[USER], stream=True),
        "completions": lambda: client.completions.create(model="m", prompt="what?", stream=True),
        "responses": lambda: client.responses.create(model="m", input="what?", stream=True),
    }
    async for event in await calls[endpoint]():
        seen.append(event)  # noqa: PERF401 - what came before the error is kept


def test_the_error_event_of_responses_is_typed_and_numbered() -> None:
    event = error_event("responses", ERROR, sequence_number=7)
    assert event.startswith(b"event: error\ndata: ")
    payload = orjson.loads(event.split(b"data: ")[1])
    assert payload == {
        "type": "error",
        "code": "upstream_died",
        "message": "the backend died",
        "param": None,
        "sequence_number": 7,
        "error": ERROR,
    }
