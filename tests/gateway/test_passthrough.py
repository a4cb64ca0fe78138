"""Paths that the cache does not know: bytes in, bytes out, as streams."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes import End, Hang, Reply, ScriptedUpstream, error_reply, json_reply
from tests.gateway.harness import Client, serving, settings_for


async def test_method_path_query_headers_and_body_are_untouched(client: Client, upstream: ScriptedUpstream) -> None:
    body = gzip.compress(b"\x00\xff binary" * 1000)
    upstream.script(Reply((body,), 201, {"content-type": "x/y", "content-encoding": "gzip", "x-vendor": "1"}))
    async with client.session.request(
        "PUT",
        f"{client.url}/v1/files/a/content?after=1&x=%26",
        data=b"\x00raw\xff",
        headers={"x-own": "1", "authorization": "Bearer k", "accept-encoding": "gzip", "user-agent": "mine"},
    ) as response:
        assert response.status == 201
        assert response.headers["x-vendor"] == "1"
        assert response.headers["content-encoding"] == "gzip"
        assert await response.read() == gzip.decompress(body)
        assert "cache-status" not in response.headers
        assert "x-request-id" not in response.headers
    sent = upstream.exchanges[0]
    assert (sent.method, sent.path, sent.body) == ("PUT", "/v1/files/a/content?after=1&x=%26", b"\x00raw\xff")
    assert sent.headers["authorization"] == "Bearer k"
    assert sent.headers["x-own"] == "1"
    assert sent.headers["user-agent"] == "mine"
    assert sent.headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "POST", "HEAD", "OPTIONS"])
async def test_every_method_passes(client: Client, upstream: ScriptedUpstream, method: str) -> None:
    upstream.script(json_reply({"fine": True}))
    answer = await client.ask(method, "/v1/assistants/a1")
    assert answer.status == 200
    assert upstream.exchanges[0].method == method


async def test_percent_encoding_is_kept(client: Client, upstream: ScriptedUpstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(client.url.rpartition(":")[2]))
    writer.write(b"GET /v1/files/a%2Fb%20c?x=%26 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    await reader.read()
    writer.close()
    await writer.wait_closed()
    assert upstream.exchanges[0].path == "/v1/files/a%2Fb%20c?x=%26"


async def test_an_upload_is_streamed(client: Client, upstream: ScriptedUpstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(50):
            yield bytes([number]) * 10_000

    upstream.script(json_reply({"fine": True}))
    answer = await client.ask("POST", "/v1/audio/transcriptions", data=pieces())
    assert answer.status == 200
    assert upstream.exchanges[0].body == b"".join([bytes([number]) * 10_000 for number in range(50)])


async def test_an_answer_is_streamed(client: Client, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.script(Reply((b"first", gate, b"second"), headers={"content-type": "text/event-stream"}))
    async with client.session.post(f"{client.url}/v1/threads/runs", data=b"{}") as response:
        assert await response.content.readany() == b"first"
        gate.set()
        assert await response.content.read() == b"second"


async def test_a_bodies_limit_does_not_bind_what_passes(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, upstream, server={"max_body": "1KiB"})
    async with serving(settings) as client:
        upstream.script(json_reply({"fine": True}))
        assert (await client.ask("POST", "/v1/files", data=b"x" * 100_000)).status == 200
        assert len(upstream.exchanges[0].body) == 100_000


async def test_errors_pass_unchanged(client: Client, upstream: ScriptedUpstream) -> None:
    upstream.script(error_reply(404, "no such file"))
    answer = await client.ask("GET", "/v1/files/f1")
    assert (answer.status, answer.json()["error"]["message"]) == (404, "no such file")


async def test_a_client_that_hangs_up_ends_the_backends_work(client: Client, upstream: ScriptedUpstream) -> None:
    upstream.script(Hang())
    asking = asyncio.create_task(client.ask("GET", "/v1/files"))
    exchange = await upstream.arrival()
    asking.cancel()
    await asyncio.wait_for(exchange.disconnected.wait(), 5)


async def test_a_backend_that_dies_in_mid_answer_breaks_the_connection(
    client: Client, upstream: ScriptedUpstream
) -> None:
    upstream.script(Reply((b"half",), headers={"content-length": "100"}, end=End.ABORT))
    with pytest.raises(Exception, match=r"payload|Server disconnected|Connection"):
        await client.ask("GET", "/v1/files")


async def test_models_are_merged(tmp_path: Path) -> None:
    def listing(*names: str) -> Reply:
        models = [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in names]
        return json_reply({"object": "list", "data": models})

    async with (
        ScriptedUpstream(default=listing("a", "shared")) as one,
        ScriptedUpstream(default=listing("b", "shared", "hidden")) as two,
    ):
        upstreams = [
            {"name": "one", "kind": "openai", "url": one.url},
            {"name": "two", "kind": "openai", "url": two.url, "models": ["b", "shared"]},
        ]
        async with serving(settings_for(tmp_path, upstreams=upstreams)) as client:
            listed = (await client.ask("GET", "/v1/models")).json()
            assert listed["object"] == "list"
            assert sorted(model["id"] for model in listed["data"]) == ["a", "b", "shared"]
            await two.stop()
            listed = (await client.ask("GET", "/v1/models")).json()
            assert sorted(model["id"] for model in listed["data"]) == ["a", "shared"]
            await one.stop()
            assert (await client.ask("GET", "/v1/models")).status == 502


async def test_a_backend_can_be_named(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(default=json_reply({"n": 1})) as one,
        ScriptedUpstream(default=json_reply({"n": 2})) as two,
        serving(settings_for(tmp_path, one, two)) as client,
    ):
        answer = await client.ask("GET", "/v1/files", headers={"x-hitpath-upstream": "up1"})
        assert answer.json() == {"n": 2}
        unknown = await client.ask("GET", "/v1/files", headers={"x-hitpath-upstream": "up9"})
        assert (unknown.status, unknown.json()["error"]["param"]) == (400, "x-hitpath-upstream")
