from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.wire import BrokenStream, Verdict
from gateway.wire.responses import ResponsesWire
from gateway.wire.sse import SseParser
from policies.reasons import NotStored
from tests.gateway.wire.answers import long_texts, names, texts

WIRE = ResponsesWire()
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

logprob = st.fixed_dictionaries(
    {"token": texts, "logprob": st.floats(-20, 0), "bytes": st.just([1]), "top_logprobs": st.just([])}
)
citation = st.fixed_dictionaries(
    {"type": st.just("url_citation"), "url": texts, "title": texts, "start_index": st.just(0), "end_index": st.just(1)}
)
text_part = st.fixed_dictionaries(
    {
        "type": st.just("output_text"),
        "text": texts | long_texts,
        "annotations": st.lists(citation, max_size=2),
        "logprobs": st.lists(logprob, max_size=2),
    }
)
refusal_part = st.fixed_dictionaries({"type": st.just("refusal"), "refusal": texts})
completed = st.just("completed")
items = st.one_of(
    st.fixed_dictionaries(
        {
            "id": names,
            "type": st.just("message"),
            "role": st.just("assistant"),
            "status": completed,
            "content": st.lists(text_part | refusal_part, max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {
            "id": names,
            "type": st.just("reasoning"),
            "summary": st.lists(st.fixed_dictionaries({"type": st.just("summary_text"), "text": texts}), max_size=2),
        },
        optional={
            "content": st.lists(st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": texts}), max_size=2),
            "encrypted_content": texts,
        },
    ),
    st.fixed_dictionaries(
        {
            "id": names,
            "type": st.just("function_call"),
            "status": completed,
            "call_id": names,
            "name": names,
            "arguments": texts | long_texts,
        }
    ),
    st.fixed_dictionaries(
        {"id": names, "type": st.just("custom_tool_call"), "call_id": names, "name": names, "input": texts}
    ),
    st.fixed_dictionaries(
        {
            "id": names,
            "type": st.just("web_search_call"),
            "status": completed,
            "action": st.just({"type": "search", "query": "q"}),
        }
    ),
)


def response(*output: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "completed_at": 2,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "m",
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 8,
        },
        **more,
    }


def message(*content: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": list(content),
        **more,
    }


TEXT = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}


@settings(max_examples=60)
@given(st.lists(items, max_size=3))
def test_an_answer_survives_being_read_as_a_stream(output: list[Any]) -> None:
    whole = response(*output)
    events = SseParser().feed(b"".join(WIRE.replay(orjson.dumps(whole), include_usage=False)))
    assert WIRE.merge(event.data for event in events) == whole
    payloads = [orjson.loads(event.data) for event in events]
    assert [event.event for event in events] == [payload["type"] for payload in payloads]
    assert [payload["sequence_number"] for payload in payloads] == list(range(len(events)))
    for event in events:
        EVENT.validate_json(event.data)
    assert _rebuilt(payloads) == output


def _rebuilt(payloads: list[dict[str, Any]]) -> list[Any]:
    """Put the output together as a client does that reads only what is added and the deltas."""
    output: list[Any] = []
    for payload in payloads:
        kind = payload["type"].removeprefix("response.")
        if kind == "output_item.added":
            output.append(payload["item"])
            if "status" in payload["item"]:
                payload["item"]["status"] = "completed"
        elif kind == "content_part.added":
            output[-1]["content"].append(payload["part"])
        elif kind == "reasoning_summary_part.added":
            output[-1]["summary"].append(payload["part"])
        elif kind == "output_text.annotation.added":
            output[-1]["content"][-1]["annotations"].append(payload["annotation"])
        elif kind == "output_text.done":
            output[-1]["content"][-1]["logprobs"] += payload["logprobs"]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            output[-1]["content"][-1]["text"] += payload["delta"]
        elif kind == "refusal.delta":
            output[-1]["content"][-1]["refusal"] += payload["delta"]
        elif kind == "reasoning_summary_text.delta":
            output[-1]["summary"][-1]["text"] += payload["delta"]
        elif kind == "function_call_arguments.delta":
            output[-1]["arguments"] += payload["delta"]
        elif kind == "custom_tool_call_input.delta":
            output[-1]["input"] += payload["delta"]
    return output


def test_a_replay_tells_its_events_in_order() -> None:
    events = SseParser().feed(b"".join(WIRE.replay(orjson.dumps(response(message(TEXT))), include_usage=False)))
    assert [event.event.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    begun = orjson.loads(events[0].data)["response"]
    assert (begun["status"], begun["output"], begun["usage"], begun["completed_at"]) == ("in_progress", [], None, None)


def test_items_told_only_in_their_own_events_are_kept() -> None:
    events = [
        {"type": "response.output_item.done", "output_index": 1, "item": message(TEXT)},
        {"type": "response.output_item.done", "output_index": 0, "item": {"type": "reasoning"}},
        {"type": "response.completed", "response": response()},
    ]
    merged = WIRE.merge(map(orjson.dumps, events))
    assert [item["type"] for item in merged["output"]] == ["reasoning", "message"]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"type": "response.created", "response": response()}],
        [{"type": "error", "code": "x", "message": "y", "param": None}],
        [{"type": "response.completed"}],
        [{"error": {"message": "x"}}],
        [{"type": "response.output_item.done", "output_index": "x", "item": {}}],
    ],
)
def test_a_broken_stream_is_no_answer(events: list[dict[str, Any]]) -> None:
    with pytest.raises(BrokenStream):
        WIRE.merge(map(orjson.dumps, events))


@pytest.mark.parametrize(
    ("kind", "more", "refusal"),
    [
        ("incomplete", {"incomplete_details": {"reason": "max_output_tokens"}}, NotStored.TRUNCATED),
        ("incomplete", {"incomplete_details": {"reason": "content_filter"}}, NotStored.FILTERED),
        ("failed", {"error": {"code": "server_error", "message": "x"}}, NotStored.ERROR_STATUS),
    ],
)
def test_a_response_that_did_not_complete_is_refused(kind: str, more: dict[str, Any], refusal: NotStored) -> None:
    whole = response(message(TEXT), status=kind, **more)
    merged = WIRE.merge([orjson.dumps({"type": f"response.{kind}", "response": whole})])
    assert WIRE.inspect(merged) == Verdict(refusal, 3, 5)


@pytest.mark.parametrize(
    ("whole", "refusal"),
    [
        (response(message(TEXT)), None),
        (response(message({"type": "refusal", "refusal": "No."})), None),
        (response({"type": "function_call", "name": "f", "arguments": "{}"}), None),
        (response(), NotStored.EMPTY),
        (response(message()), NotStored.EMPTY),
        (response({"type": "reasoning", "summary": []}), NotStored.EMPTY),
        (response(message(TEXT, status="incomplete")), NotStored.TRUNCATED),
        (response(status="cancelled"), NotStored.ERROR_STATUS),
        (response(status="queued"), NotStored.MALFORMED),
        (response(message(TEXT), status="in_progress"), NotStored.MALFORMED),
        (response(output=None), NotStored.MALFORMED),
        (response(message(TEXT), vendor=orjson.loads(b"[" * 600 + b"]" * 600)), NotStored.MALFORMED),
        (response(output=[1]), NotStored.MALFORMED),
        ([], NotStored.MALFORMED),
    ],
)
def test_only_a_whole_answer_is_kept(whole: Any, refusal: NotStored | None) -> None:
    assert WIRE.inspect(whole).refusal is refusal
