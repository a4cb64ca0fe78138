from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from loadtest.scripted import answer_text
from tests.fakes import (
    End,
    Hang,
    Normal,
    NotHttp,
    Reply,
    ScriptedUpstream,
    error_reply,
    json_reply,
    refused_url,
    stream_reply,
)

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_an_unscripted_request_gets_the_normal_answer_and_is_recorded(client: aiohttp.ClientSession) -> None:
    async with ScriptedUpstream() as upstream:
        async with client.post(f"{upstream.url}/chat/completions?a=b", json=ASKED, headers={"X-One": "1"}) as response:
            answer = await response.json()
        assert answer["choices"][0]["message"]["content"] == answer_text("m", "hello")
        [exchange] = upstream.exchanges
        assert (exchange.method, exchange.path) == ("POST", "/v1/chat/completions?a=b")
        assert exchange.headers["x-one"] == "1"
        assert exchange.json() == ASKED
        assert not exchange.disconnected.is_set()


async def test_replies_come_in_order_and_word_for_word(client: aiohttp.ClientSession) -> None:
    replies = (json_reply(b'{ "odd" : 1 }', 202), error_reply(429, retry_after="7"), Normal(tokens=2))
    async with ScriptedUpstream(*replies) as upstream:
        url = f"{upstream.url}/chat/completions"
        async with client.post(url, json=ASKED) as response:
            assert (response.status, await response.read()) == (202, b'{ "odd" : 1 }')
        async with client.post(url, json=ASKED) as response:
            assert (response.status, response.headers["retry-after"]) == (429, "7")
        async with client.post(url, json=ASKED) as response:
            assert (await response.json())["usage"]["completion_tokens"] == 2


async def test_a_gate_holds_the_events_behind_it(client: aiohttp.ClientSession) -> None:
    gate = asyncio.Event()
    async with ScriptedUpstream(stream_reply({"n": 1}, gate, {"n": 2})) as upstream:
        async with client.post(f"{upstream.url}/chat/completions", json=ASKED) as response:
            assert await response.content.readuntil(b"\n\n") == b'data: {"n":1}\n\n'
            rest = asyncio.ensure_future(response.content.read())
            await asyncio.sleep(0)
            assert not rest.done()
            gate.set()
            assert await rest == b'data: {"n":2}\n\ndata: [DONE]\n\n'
        await upstream.exchanges[0].finished.wait()
        assert not upstream.exchanges[0].disconnected.is_set()


async def test_an_abort_breaks_the_stream_after_what_was_sent(client: aiohttp.ClientSession) -> None:
    async with (
        ScriptedUpstream(stream_reply({"n": 1}, end=End.ABORT)) as upstream,
        client.post(f"{upstream.url}/chat/completions", json=ASKED) as response,
    ):
        assert await response.content.readuntil(b"\n\n") == b'data: {"n":1}\n\n'
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.read()


@pytest.mark.parametrize("script", [Hang(), Reply((b"data: 1\n\n",), end=End.HANG), Normal(gate=asyncio.Event())])
async def test_a_client_that_goes_is_noticed(script: Hang | Reply | Normal, client: aiohttp.ClientSession) -> None:
    async with ScriptedUpstream(script) as upstream:
        call = asyncio.ensure_future(client.post(f"{upstream.url}/chat/completions", json=ASKED))
        exchange = await upstream.arrival()
        if isinstance(script, Reply):
            (await call).close()
        else:
            call.cancel()
        await exchange.disconnected.wait()


async def test_what_is_not_http_is_an_error_of_the_client(client: aiohttp.ClientSession) -> None:
    async with ScriptedUpstream(NotHttp()) as upstream:
        with pytest.raises(aiohttp.ClientError):
            await client.post(f"{upstream.url}/chat/completions", json=ASKED)


async def test_a_stopped_upstream_refuses_and_comes_back_on_the_same_port(client: aiohttp.ClientSession) -> None:
    upstream = ScriptedUpstream()
    await upstream.start()
    url = f"{upstream.url}/chat/completions"
    await upstream.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.post(url, json=ASKED)
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.post(f"{refused_url()}/chat/completions", json=ASKED)
    async with upstream, client.post(url, json=ASKED) as response:
        assert response.status == 200


async def test_it_listens_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with (
        ScriptedUpstream(uds=path),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.post("http://local/v1/chat/completions", json=ASKED) as response,
    ):
        assert response.status == 200
