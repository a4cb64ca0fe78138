"""Backends that refuse, hang, die, or talk nonsense: a clear error, nothing stored, nothing left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import End, Hang, NotHttp, Reply, ScriptedUpstream, json_reply, refused_url, stream_reply
from tests.gateway.harness import Client, chat_body, serving, settings_for
from tests.gateway.test_cached import chunk


def impatient(upstream: ScriptedUpstream) -> list[dict[str, Any]]:
    timeouts = {"connect": "200ms", "first_byte": "100ms", "idle": "100ms"}
    return [{"name": "up0", "kind": "openai", "url": upstream.url, "timeouts": timeouts}]


async def stored(client: Client) -> int:
    return client.gateway.store.stats().entries


async def test_a_backend_that_refuses(tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, refused_url())) as client:
        for stream in (False, True):
            answer = await client.chat("hello", stream=stream)
            error = answer.json()["error"]
            assert (answer.status, error["code"], error["type"]) == (502, "backend_unreachable", "backend_error")
            assert "up0" in error["message"]
            assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_backend_that_hangs(upstream: ScriptedUpstream, tmp_path: Path, stream: bool) -> None:
    async with serving(settings_for(tmp_path, upstreams=impatient(upstream))) as client:
        upstream.script(Hang())
        answer = await client.chat("hello", stream=stream)
        assert (answer.status, answer.json()["error"]["code"]) == (504, "backend_timeout")
        exchange = await upstream.arrival()
        await asyncio.wait_for(exchange.disconnected.wait(), 5)
        assert await stored(client) == 0
        assert (await client.chat("hello", stream=stream)).status == 200


async def test_a_stream_that_falls_silent(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, upstreams=impatient(upstream))) as client:
        upstream.script(stream_reply(chunk("one"), end=End.HANG))
        answer = await client.chat("hello", stream=True)
        assert answer.status == 200
        assert answer.events()[0]["choices"][0]["delta"]["content"] == "one"
        assert answer.events()[-1]["error"]["code"] == "backend_timeout"
        assert b"event: error\n" in answer.body
        assert b"[DONE]" not in answer.body
        assert await stored(client) == 0


DYING: list[tuple[str, Reply]] = [
    ("torn", stream_reply(chunk("one"), end=End.ABORT)),
    ("unfinished", stream_reply(chunk("one"), done=False)),
    ("within an event", stream_reply(chunk("one"), b'data: {"id": "c1", "ch', done=False)),
    ("garbage", stream_reply(chunk("one"), b"data: <html>oops</html>\n\n", chunk(finish="stop"))),
    ("half JSON", stream_reply(chunk("one"), b'data: {"choices": [}\n\n', chunk(finish="stop"))),
]


@pytest.mark.parametrize("script", [script for _, script in DYING], ids=[name for name, _ in DYING])
async def test_a_stream_that_breaks(client: Client, upstream: ScriptedUpstream, script: Reply) -> None:
    upstream.script(script)
    answer = await client.chat("hello", stream=True)
    assert answer.body.startswith(b"data: ")
    assert b'"error":{"message":"upstream up0' in answer.body
    assert b"backend_broken" in answer.body
    assert b"[DONE]" not in answer.body
    assert await stored(client) == 0
    assert (await client.chat("hello", stream=True)).text.strip()


async def test_followers_of_a_stream_that_breaks_hear_of_it(client: Client, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.script(stream_reply(chunk("one"), gate, end=End.ABORT))
    streaming = asyncio.create_task(client.chat("hello", stream=True))
    await upstream.arrival()
    whole = asyncio.create_task(client.chat("hello"))
    await asyncio.sleep(0.05)
    gate.set()
    assert (await streaming).events()[-1]["error"]["code"] == "backend_broken"
    refused = await whole
    assert (refused.status, refused.json()["error"]["code"]) == (502, "backend_broken")


async def test_a_backends_own_error_event_passes_and_nothing_is_stored(
    client: Client, upstream: ScriptedUpstream
) -> None:
    error = {"error": {"message": "out of memory", "type": "server_error", "code": None, "param": None}}
    upstream.script(stream_reply(chunk("one"), error))
    answer = await client.chat("hello", stream=True)
    assert error in answer.events()
    assert await stored(client) == 0


@pytest.mark.parametrize(
    "script",
    [
        NotHttp(),
        Reply((b'{"choices": [',), headers={"content-type": "application/json"}),
        Reply((b"<html>It works!</html>",), headers={"content-type": "text/html"}),
        Reply((b'{"choices"',), headers={"content-type": "application/json", "content-length": "900"}, end=End.ABORT),
        Reply((), headers={"content-type": "application/json"}),
    ],
    ids=["not HTTP", "half JSON", "a web page", "torn body", "empty body"],
)
async def test_an_answer_that_is_garbage(client: Client, upstream: ScriptedUpstream, script: Reply | NotHttp) -> None:
    upstream.script(script)
    answer = await client.chat("hello")
    assert (answer.status, answer.json()["error"]["code"]) == (502, "backend_broken")
    assert await stored(client) == 0


async def test_a_stream_client_of_a_backend_that_does_not_stream(client: Client, upstream: ScriptedUpstream) -> None:
    message = {"role": "assistant", "content": "hi"}
    upstream.script(
        json_reply(
            {
                "id": "c1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        )
    )
    answer = await client.chat("hello", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "hi"
    assert "content-length" not in answer.headers or int(answer.headers["content-length"]) == len(answer.body)


async def test_a_stream_without_its_end_marker_gets_one(client: Client, upstream: ScriptedUpstream) -> None:
    upstream.script(stream_reply(chunk("hi"), chunk(finish="stop"), done=False))
    assert (await client.chat("hello", stream=True)).body.endswith(b"data: [DONE]\n\n")
    assert (await client.chat("hello")).text == "hi"


async def test_an_answer_larger_than_the_cache_takes_passes(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, upstream, cache={"max_answer": "64KiB"})) as client:
        long = "long " * 20_000
        chunks = [chunk(long[start : start + 5000]) for start in range(0, len(long), 5000)]
        upstream.script(stream_reply(*chunks, chunk(finish="stop")))
        assert (await client.chat("hello", stream=True)).text == long
        message = {"role": "assistant", "content": long}
        upstream.script(json_reply({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}))
        whole = await client.chat("hello")
        assert whole.text == long
        assert "detail=too-large" in whole.cache
        assert await stored(client) == 0
        assert client.gateway.store.stats().memory_by_kind.get("streams", 0) == 0


async def test_the_error_in_a_responses_stream_has_its_own_shape(client: Client, upstream: ScriptedUpstream) -> None:
    created = {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "object": "response"}}
    upstream.script(stream_reply(created, end=End.ABORT))
    answer = await client.post("/v1/responses", {"model": "m", "input": "hello", "stream": True})
    last = answer.events()[-1]
    assert (last["type"], last["code"]) == ("error", "backend_broken")


async def test_no_task_is_left_behind(client: Client, upstream: ScriptedUpstream) -> None:
    before = len(asyncio.all_tasks())
    upstream.script(stream_reply(chunk("one"), end=End.ABORT), NotHttp(), stream_reply(chunk("x"), done=False))
    for number in range(3):
        await client.post("/v1/chat/completions", chat_body(f"hello {number}", stream=number != 1))
    while len(asyncio.all_tasks()) > before + 2:
        await asyncio.sleep(0.01)
