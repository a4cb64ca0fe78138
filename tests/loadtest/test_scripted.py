from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest

from gateway.wire.endpoints import WIRES
from gateway.wire.sse import SseParser
from loadtest.scripted import CREATED, Pace, ScriptedBackend, answer_text, respond, vector
from policies.reasons import NotStored

PACE = Pace(tokens=5)
CHAT = {"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("chat", "/v1/chat/completions", CHAT),
    ("chat", "/v1/chat/completions", CHAT | {"n": 2}),
    ("chat", "/v1/chat/completions", CHAT | {"logprobs": True}),
    ("chat", "/v1/chat/completions", CHAT | TOOLS),
    ("completions", "/v1/completions", {"model": "m", "prompt": "what?", "n": 2}),
    ("responses", "/v1/responses", {"model": "m", "input": "what?"}),
    ("responses", "/v1/responses", {"model": "m", "input": [{"role": "user", "content": [{"text": "what?"}]}]}),
]


def ask(path: str, body: dict[str, Any]) -> Any:
    answer = respond(path, orjson.dumps(body), PACE)
    assert answer.status == 200, answer
    return orjson.loads(b"".join(answer.parts))


@pytest.mark.parametrize(("endpoint", "path", "body"), ASKED)
def test_a_stream_adds_up_to_the_answer_that_is_not_streamed(endpoint: str, path: str, body: dict[str, Any]) -> None:
    wire = WIRES[endpoint]
    stream = respond(path, orjson.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}), PACE)
    events = SseParser().feed(b"".join(stream.parts))
    assert [event.raw for event in events] == stream.parts
    whole = ask(path, body)
    assert wire.inspect(whole).refusal is None
    merged = wire.merge(event.data for event in events)
    for choice in merged.get("choices", ()):
        choice.setdefault("logprobs", None)
    assert merged == whole


def test_an_answer_names_its_question() -> None:
    said = ask("/v1/chat/completions", CHAT)["choices"][0]["message"]["content"]
    assert said == answer_text("m", "what?", 5)
    assert said != answer_text("m", "what", 5)
    assert said != answer_text("n", "what?", 5)


@pytest.mark.parametrize(("endpoint", "path", "body"), [ASKED[0], ASKED[4], ASKED[5]])
def test_a_limit_on_tokens_truncates(endpoint: str, path: str, body: dict[str, Any]) -> None:
    for limited in (body | {"max_tokens": 2}, body | {"max_tokens": 2, "stream": True}):
        parts = respond(path, orjson.dumps(limited), PACE).parts
        if "stream" in limited:
            answer = WIRES[endpoint].merge(event.data for event in SseParser().feed(b"".join(parts)))
        else:
            answer = orjson.loads(parts[0])
        assert WIRES[endpoint].inspect(answer).refusal is NotStored.TRUNCATED


def test_vectors_are_unit_vectors_of_the_asked_length_in_both_encodings() -> None:
    asked = {"model": "m", "input": ["one two", "one three"], "dimensions": 8}
    numbers = ask("/v1/embeddings", asked)
    texts = ask("/v1/embeddings", asked | {"encoding_format": "base64"})
    rows = np.array([item["embedding"] for item in numbers["data"]], dtype=np.float32)
    decoded = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), np.float32) for item in texts["data"]])
    assert rows.shape == (2, 8)
    np.testing.assert_array_equal(rows, decoded)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert WIRES["embeddings"].inspect(numbers).refusal is None
    assert WIRES["embeddings"].inspect(texts).refusal is None
    assert vector("how do I open a file") @ vector("how do I open a door") > 0.5


def test_models_are_listed() -> None:
    assert ask("/v1/models", {})["data"][0]["created"] == CREATED


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b"{}", 400),
        ("/v1/chat/completions", b'{"messages":[{}],"tool_choice":{"a":1}}', 400),
        ("/v1/completions", b"{}", 400),
        ("/v1/embeddings", b'{"input":{"a":1}}', 400),
        ("/v1/responses", b"{}", 400),
        ("/v1/nothing", b"{}", 404),
    ],
)
def test_nonsense_gets_an_error_of_the_right_shape(path: str, body: bytes, status: int) -> None:
    answer = respond(path, body, PACE)
    assert answer.status == status
    assert set(orjson.loads(answer.parts[0])["error"]) == {"message", "type", "param", "code"}


async def served(backend: ScriptedBackend, path: str, *body: bytes) -> list[MutableMapping[str, Any]]:
    """Give what the application sends when the request's body comes in these parts."""
    asked = iter([{"type": "http.request", "body": part, "more_body": part is not body[-1]} for part in body])
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return next(asked)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await backend({"type": "http", "path": path}, receive, send)
    return sent


async def test_the_application_reads_a_body_in_parts_and_tells_its_length() -> None:
    body = orjson.dumps(CHAT)
    start, answer = await served(ScriptedBackend(PACE), "/v1/chat/completions", body[:9], body[9:])
    assert start["status"] == 200
    assert dict(start["headers"])[b"content-length"] == b"%d" % len(answer["body"])
    assert answer["body"] == respond("/v1/chat/completions", body, PACE).parts[0]


async def test_the_application_paces_a_stream_event_by_event() -> None:
    body = orjson.dumps(CHAT | {"stream": True})
    parts = respond("/v1/chat/completions", body, PACE).parts
    at_once = await served(ScriptedBackend(PACE), "/v1/chat/completions", body)
    assert [message["body"] for message in at_once[1:]] == [b"".join(parts)]
    pace = Pace(tokens=5, latency=1e-4, interval=1e-4)
    paced = await served(ScriptedBackend(pace), "/v1/chat/completions", body)
    assert [message["body"] for message in paced[1:]] == [*parts, b""]


async def test_the_command_serves_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "loadtest.scripted", "--uds", str(path))
    try:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            while True:
                try:
                    response = await session.post("http://local/v1/chat/completions", json=CHAT)
                    break
                except aiohttp.ClientConnectorError:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
            assert (await response.json())["choices"][0]["message"]["content"] == answer_text("m", "what?")
    finally:
        process.terminate()
        await process.wait()
