"""A replay cut small says the same as the whole one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.endpoints import WIRES
from gateway.wire.pace import Pace, cut
from loadtest.scripted import Pace as Length
from loadtest.scripted import respond


def answer(endpoint: str, tokens: int = 40) -> bytes:
    path, body = {
        "chat": ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hello"}]}),
        "completions": ("/v1/completions", {"model": "m", "prompt": "hello"}),
        "responses": ("/v1/responses", {"model": "m", "input": "hello"}),
    }[endpoint]
    return respond(path, orjson.dumps(body), Length(tokens)).parts[0]


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_sum_stays_the_same(endpoint: str, size: int) -> None:
    wire, body = WIRES[endpoint], answer(endpoint)
    events = list(cut(wire.replay(body, include_usage=True), size))
    payloads = [event.partition(b"data: ")[2].strip() for event in events]
    assert wire.merge(payloads) == wire.merge(
        [event.partition(b"data: ")[2].strip() for event in wire.replay(body, include_usage=True)]
    )
    if size == 1:
        assert len(events) > 40


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=60), st.integers(1, 9))
def test_no_event_has_more_text_than_asked_for(text: str, size: int) -> None:
    message = {"role": "assistant", "content": text}
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    body = orjson.dumps({**whole, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    said: list[str] = []
    for event in cut(WIRES["chat"].replay(body, include_usage=False), size):
        data = event.partition(b"data: ")[2].strip()
        choices: list[Any] = [] if data == b"[DONE]" else orjson.loads(data)["choices"]
        said += [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(said) == text
    assert max(map(len, said)) <= size


def test_log_probabilities_and_tool_calls_stay_whole() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    body = orjson.dumps({**whole, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
    replay = list(WIRES["chat"].replay(body, include_usage=False))
    assert [orjson.loads(event[6:]) for event in cut(replay, 1) if b"[DONE]" not in event] == [
        orjson.loads(event[6:]) for event in replay if b"[DONE]" not in event
    ]


@pytest.mark.parametrize("tokens", [0.1, 1.0, 20.0, 60.0, 5000.0])
def test_a_pace_is_what_it_says(tokens: float) -> None:
    pace = Pace.of(tokens)
    assert pace.size >= 1
    assert pace.size / pace.interval == pytest.approx(4 * tokens)
    assert pace.interval <= max(0.1, 0.25 / tokens + 0.01)
