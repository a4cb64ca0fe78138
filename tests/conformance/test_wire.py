"""The recorded answers of the real API, through the wire formats and back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.wire.endpoints import WIRES
from gateway.wire.sse import DONE, Event, SseParser
from policies.reasons import NotStored
from tests.conformance.cassettes import Exchange, cassettes, parameters

TRUNCATED = {
    "chat-streaming-detailed-usage",
    "chat-detailed-usage",
    "completion-basic",
    "completion-streaming",
    "completion-streaming-usage",
    "completion-token",
}


def parse(stream: bytes, size: int) -> tuple[list[Event], bool]:
    parser = SseParser()
    events = [event for at in range(0, len(stream), size) for event in parser.feed(stream[at : at + size])]
    return events, parser.finish()


def is_stream(exchange: Exchange) -> bool:
    return exchange.endpoint is not None and exchange.streams


def is_answer(exchange: Exchange) -> bool:
    return exchange.endpoint is not None and not exchange.streams


def is_generated(exchange: Exchange) -> bool:
    return is_answer(exchange) and exchange.endpoint != "embeddings" and exchange.status == 200


def wire_of(exchange: Exchange) -> Any:
    assert exchange.endpoint is not None
    return WIRES[exchange.endpoint]


@pytest.mark.skipif(not cassettes(), reason="no recordings")
def test_the_recordings_are_all_there() -> None:
    assert len(cassettes()) >= 40
    assert {exchange.endpoint for exchange in cassettes()} == {"chat", "completions", "embeddings", None}


@pytest.mark.parametrize("exchange", parameters(is_stream))
def test_a_recorded_stream_is_the_same_however_it_is_cut(exchange: Exchange) -> None:
    whole, ended = parse(exchange.response_body, len(exchange.response_body))
    assert ended
    assert whole[-1].data == DONE
    for size in (1, 2, 7, 100, 1024):
        events, ended = parse(exchange.response_body, size)
        assert events == whole
        assert ended
    assert b"".join(event.raw for event in whole) == exchange.response_body


@pytest.mark.parametrize("exchange", parameters(is_stream))
def test_a_recorded_stream_survives_merge_and_replay(exchange: Exchange) -> None:
    wire = wire_of(exchange)
    events, _ = parse(exchange.response_body, 4096)
    merged = wire.merge(event.data for event in events)
    assert wire.inspect(merged).refusal is (NotStored.TRUNCATED if exchange.name in TRUNCATED else None)
    said = [choice["delta"].get("content") if "delta" in choice else choice["text"] for choice in _choices(events)]
    choice = merged["choices"][0]
    assert (choice["message"]["content"] if "message" in choice else choice["text"]) == "".join(filter(None, said))
    replayed, _ = parse(b"".join(wire.replay(orjson.dumps(merged), include_usage=True)), 4096)
    assert wire.merge(event.data for event in replayed) == merged
    if wire.endpoint == "chat":
        ChatCompletion.model_validate(merged)


def _choices(events: list[Event]) -> list[dict[str, Any]]:
    return [choice for event in events if event.data != DONE for choice in orjson.loads(event.data)["choices"]]


@pytest.mark.parametrize("exchange", parameters(is_answer))
def test_a_recorded_answer_gets_the_right_verdict(exchange: Exchange) -> None:
    answer = orjson.loads(exchange.response_body)
    verdict = wire_of(exchange).inspect(answer)
    assert verdict.refusal is _expected(exchange, answer)
    if exchange.status == 200:
        assert verdict.prompt_tokens == answer["usage"]["prompt_tokens"]
        assert verdict.completion_tokens == answer["usage"].get("completion_tokens", 0)


def _expected(exchange: Exchange, answer: dict[str, Any]) -> NotStored | None:
    if exchange.status != 200:
        return NotStored.ERROR_STATUS
    reasons = {choice["finish_reason"] for choice in answer.get("choices", ())}
    return NotStored.TRUNCATED if "length" in reasons else None


@pytest.mark.parametrize("exchange", parameters(is_generated))
def test_a_recorded_answer_survives_being_read_as_a_stream(exchange: Exchange) -> None:
    wire = wire_of(exchange)
    events, _ = parse(b"".join(wire.replay(exchange.response_body, include_usage=True)), 4096)
    if exchange.endpoint == "chat":
        for event in events[:-1]:
            ChatCompletionChunk.model_validate_json(event.data)
    assert wire.merge(event.data for event in events) == orjson.loads(exchange.response_body)
