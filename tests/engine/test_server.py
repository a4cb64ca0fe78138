"""The whole engine over a real socket, through the official client."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.engine.conftest import Served

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "It was a dark and stormy night."}]
ENDLESS: dict[str, Any] = {
    "model": "bundled",
    "messages": HELLO,
    "max_tokens": 8000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_chat_answer_ends_by_itself_and_is_counted(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="bundled", messages=HELLO, seed=1)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert "<|" not in choice.message.content
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_adds_up_to_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "messages": HELLO, "seed": 7}
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    first, *middle, last, counted = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in middle) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(c.choices[0].finish_reason is None for c in (first, *middle))
    assert counted.choices == []
    assert counted.usage == whole.usage
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1


async def test_without_asking_a_stream_has_no_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="bundled", messages=HELLO, max_tokens=3, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_the_bytes_of_a_stream(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{served.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        text = (await response.read()).decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


async def test_several_choices_and_log_probabilities(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="bundled", messages=HELLO, n=2, seed=1, max_tokens=4, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert "".join(scored.token for scored in choice.logprobs.content) == choice.message.content
        assert all(len(scored.top_logprobs) == 3 and scored.logprob <= 0 for scored in choice.logprobs.content)


async def test_stop_strings_are_not_shown(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "bundled", "prompt": "He said that", "temperature": 0, "max_tokens": 30}
    free = await client.completions.create(**asked)
    text = free.choices[0].text
    middle = text[len(text) // 2 :][:4]
    cut = await client.completions.create(**asked, stop=[middle, "never said"])
    assert cut.choices[0].text == text[: text.index(middle)]
    assert cut.choices[0].finish_reason == "stop"


async def test_completions_of_text_and_token_ids(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="bundled", prompt=["Once upon a time", "Call me"], temperature=0, max_tokens=6, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 6
    by_ids = await client.completions.create(model="bundled", prompt=[[300, 301], [302]], temperature=0, max_tokens=2)
    assert len(by_ids.choices) == 2
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3
    stream = await client.completions.create(
        model="bundled", prompt="Once upon a time", temperature=0, max_tokens=6, stream=True
    )
    assert "".join([c.choices[0].text async for c in stream]) == answer.choices[0].text


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["bundled"]
    assert (await client.models.retrieve("bundled")).owned_by == "hitpath"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_errors_have_the_clients_types(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="bundled", messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model="bundled", messages=[{"role": "user", "content": "a b " * 9000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as outside:
        await client.completions.create(model="bundled", prompt=[4096])
    assert outside.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as many:
        await client.completions.create(model="bundled", prompt=["a"] * 33, n=2)
    assert many.value.param == "n"


def test_the_synchronous_client(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="bundled", messages=HELLO, max_tokens=3, temperature=0)
        stream = client.chat.completions.create(
            model="bundled", messages=HELLO, max_tokens=3, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == answer.choices[0].message.content


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b"x" * (17 * 2**20), 413),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/nothing", None, 404),
    ],
)
async def test_refusals_outside_the_client(
    served: Served, method: str, path: str, body: bytes | None, status: int
) -> None:
    stream = None if body is None else io.BytesIO(body)
    async with aiohttp.ClientSession() as session, session.request(method, served.url + path, data=stream) as response:
        assert response.status == status
        assert set((await response.json())["error"]) == {"message", "type", "param", "code"}


async def metrics(served: Served) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{served.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (re.split(r" (?=\S+$)", line) for line in lines if line[0] != "#")}


async def reach(served: Served, name: str, value: int) -> None:
    """Return once this figure is so high."""
    async with asyncio.timeout(30):
        while (await metrics(served))[name] < value:
            await asyncio.sleep(0.02)


async def idle(served: Served) -> None:
    """Return once nothing runs and nothing waits."""
    async with asyncio.timeout(30):
        while True:
            now = await metrics(served)
            if now["hitpath_engine_running"] == now["hitpath_engine_waiting"] == 0:
                return
            await asyncio.sleep(0.02)


async def test_a_client_that_leaves_a_stream_ends_its_generation(served: Served, client: openai.AsyncOpenAI) -> None:
    before = (await metrics(served))['hitpath_engine_tokens_total{kind="completion"}']
    stream = await client.chat.completions.create(**ENDLESS, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert (await metrics(served))["hitpath_engine_running"] == 1
    await stream.close()
    await idle(served)
    assert (await metrics(served))['hitpath_engine_tokens_total{kind="completion"}'] == before


async def test_a_client_that_leaves_while_waiting_ends_its_generation(served: Served) -> None:
    address = urlsplit(served.url)
    body = json.dumps({"messages": HELLO, "max_tokens": 8000, "ignore_eos": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection((address.hostname, address.port)) as raw:
        raw.sendall(head + body)
        await reach(served, "hitpath_engine_running", 1)
    await idle(served)


async def test_a_full_queue_says_when_to_come_back(served: Served, client: openai.AsyncOpenAI) -> None:
    streams = [await client.chat.completions.create(**ENDLESS, stream=True) for _ in range(4)]
    await reach(served, "hitpath_engine_running", 4)
    # A stream begins with its first token, so these wait with their requests.
    waiting = [asyncio.create_task(client.chat.completions.create(**ENDLESS, stream=True)) for _ in range(8)]
    await reach(served, "hitpath_engine_waiting", 8)
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(**ENDLESS, stream=True)
    assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for stream in streams:
        await stream.close()
    await idle(served)


async def test_health(served: Served) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{served.url}/healthz") as response:
        assert await response.json() == {"status": "ok", "model": "bundled"}
    assert re.match(r"hitpath engine ready http://127\.0\.0\.1:\d+ model=bundled device=\S+ ", served.ready)
