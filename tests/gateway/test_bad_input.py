"""Nonsense from clients: a clear error of the right shape each time, and the process lives."""

from __future__ import annotations

import asyncio
import gzip
import io
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.call import exact_key, parse_body
from gateway.errors import BadRequestError
from policies.canonical import Origin
from tests.fakes import ScriptedUpstream, error_reply
from tests.gateway.harness import Client, chat_body


async def refused(client: Client, body: Any, status: int, path: str = "/v1/chat/completions", **headers: str) -> Any:
    answer = await client.post(path, body, **headers)
    assert answer.status == status, answer.body
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (await client.ask("GET", "/healthz")).status == 200
    return error


MALFORMED = [
    b"",
    b"{",
    b"not json",
    b'{"model": "m", "messages": [}',
    b"\xff\xfe",
    b'{"model": "\\ud800"}',
    b'{"model": NaN}',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"[" * 100_000,
    b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model":"m","messages":' + b"[" * 600 + b"]" * 600 + b"}",
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_body_that_is_not_a_json_object(client: Client, upstream: ScriptedUpstream, body: bytes) -> None:
    error = await refused(client, body, 400)
    assert error["type"] == "invalid_request_error"
    assert upstream.exchanges == []


@pytest.mark.parametrize("model", [None, 7, "", [], {}])
async def test_a_model_that_is_no_name(client: Client, model: Any) -> None:
    assert (await refused(client, {"model": model, "messages": []}, 400))["param"] == "model"


async def test_a_number_that_cannot_be_told_from_another(client: Client) -> None:
    body = b'{"model":"m","messages":[],"seed":123456789012345678901234567890}'
    assert "too large" in (await refused(client, body, 400))["message"]


WRONG_TYPES: list[dict[str, Any]] = [
    {"messages": "hello"},
    {"messages": [1, None, "x"]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": {"role": "user"}},
    {"stream_options": "all"},
    {"stream": "yes"},
    {"tools": 5},
    {"temperature": "hot"},
]


@pytest.mark.parametrize("fields", WRONG_TYPES, ids=range(len(WRONG_TYPES)))
@pytest.mark.parametrize("stream", [False, True])
async def test_the_backend_judges_the_fields_that_are_its_own(
    client: Client, upstream: ScriptedUpstream, fields: dict[str, Any], stream: bool
) -> None:
    upstream.default = error_reply(400, "no such thing")
    body = {**chat_body("hello", stream=stream), **fields}
    assert (await refused(client, body, 400))["message"] == "no such thing"


async def test_a_body_of_50_megabytes(client: Client, upstream: ScriptedUpstream) -> None:
    answer = await client.ask("POST", "/v1/chat/completions", data=io.BytesIO(b'"' + b"x" * 50_000_000 + b'"'))
    assert answer.status == 413
    assert "33554432" in answer.json()["error"]["message"]
    assert (await client.ask("GET", "/healthz")).status == 200
    assert upstream.exchanges == []


async def test_a_large_body_without_a_length(client: Client) -> None:
    async def pieces() -> Any:
        for _ in range(50):
            yield b"x" * 1_000_000

    answer = await client.ask("POST", "/v1/chat/completions", data=pieces())
    assert answer.status == 413


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("cache-control", "max-age=soon"),
        ("x-hitpath-mode", "fuzzy"),
        ("x-hitpath-ttl", "5 parsecs"),
        ("x-hitpath-threshold", "2"),
        ("x-hitpath-category", "astrology"),
    ],
)
async def test_a_control_that_cannot_be_read(client: Client, header: str, value: str) -> None:
    error = await refused(client, chat_body("hello"), 400, **{header: value})
    assert error["param"] == header


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/", 404),
        ("POST", "/chat/completions", 404),
        ("GET", "/admin/stats", 404),
        ("GET", "/v2/chat/completions", 404),
    ],
)
async def test_paths_and_methods_that_are_not_there(client: Client, method: str, path: str, status: int) -> None:
    answer = await client.ask(method, path)
    assert (answer.status, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


@given(body=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: ('{"model":"m","a":' + text).encode()))
def test_no_bytes_at_all_bring_the_reading_down(body: bytes) -> None:
    try:
        parsed = parse_body(body)
        exact_key(Origin("chat", "n", "b"), parsed)
    except BadRequestError as error:
        error.body()


async def test_a_client_that_speaks_no_http(client: Client) -> None:
    port = int(client.url.rpartition(":")[2])
    for nonsense in (
        b"\x16\x03\x01\x00",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(nonsense)
        writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
    assert (await client.chat("hello")).status == 200


async def test_a_client_that_hangs_up_in_the_middle_of_its_request(client: Client, upstream: ScriptedUpstream) -> None:
    port = int(client.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await client.chat("hello")).status == 200
    assert len(upstream.exchanges) == 1


async def test_a_compressed_body_is_passed_through(client: Client, upstream: ScriptedUpstream) -> None:
    body = gzip.compress(orjson.dumps(chat_body("hello")))
    answer = await client.ask("POST", "/v1/chat/completions", headers={"content-encoding": "gzip"}, data=body)
    assert (answer.status, answer.cache) == (200, "")
    assert upstream.exchanges[0].headers["content-encoding"] == "gzip"
