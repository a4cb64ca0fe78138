from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.wire import BrokenStream, Verdict
from gateway.wire.chat import ChatWire, strip_usage
from gateway.wire.sse import DONE, SseParser, encode
from policies.reasons import NotStored
from tests.gateway.wire import answers

WIRE = ChatWire()
DEEP = b'{"a":' * 1000 + b"1" + b"}" * 1000
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    """One chunk's payload; further keywords are fields of the chunk."""
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish}
    envelope = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return orjson.dumps({**envelope, "choices": [choice], **more})


def merged(*events: bytes) -> Any:
    return WIRE.merge([*events, DONE])


def message(*deltas: dict[str, Any]) -> Any:
    return merged(*(chunk(delta) for delta in deltas), chunk(finish="stop"))["choices"][0]["message"]


def answer(message: Any = None, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"} if message is None else message}
    return {"object": "chat.completion", "choices": [choice | {"finish_reason": finish}], "usage": USAGE, **more}


@settings(max_examples=60)
@given(answers.chats)
def test_an_answer_survives_being_read_as_a_stream(whole: dict[str, Any]) -> None:
    events = list(WIRE.replay(orjson.dumps(whole), include_usage=True))
    assert WIRE.merge(answers.payloads(b"".join(events))) == whole
    without = list(WIRE.replay(orjson.dumps(whole), include_usage=False))
    assert WIRE.merge(answers.payloads(b"".join(without))) == {
        name: value for name, value in whole.items() if name != "usage"
    }
    assert all(len(event) < 65536 for event in events)


@settings(max_examples=60)
@given(answers.standard_chats)
def test_every_replayed_event_is_one_that_clients_understand(whole: dict[str, Any]) -> None:
    *events, usage, done = answers.payloads(b"".join(WIRE.replay(orjson.dumps(whole), include_usage=True)))
    assert done == DONE
    for data in events:
        parsed = ChatCompletionChunk.model_validate_json(data)
        assert (parsed.id, parsed.created, parsed.model) == (whole["id"], whole["created"], whole["model"])
        assert len(parsed.choices) == 1
        assert parsed.usage is None
    last = ChatCompletionChunk.model_validate_json(usage)
    assert last.choices == []
    assert orjson.loads(usage)["usage"] == whole["usage"]


def test_a_replay_speaks_in_the_order_of_a_model() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    spoken = {"role": "assistant", "content": "b", "reasoning_content": "a", "tool_calls": [call]}
    events = answers.payloads(b"".join(WIRE.replay(orjson.dumps(answer(spoken)), include_usage=False)))
    deltas = [orjson.loads(data)["choices"][0]["delta"] for data in events[:-1]]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"reasoning_content": "a"},
        {"content": "b"},
        {"tool_calls": [{"index": 0, **call, "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {},
    ]


def test_a_replay_keeps_the_log_probabilities_beside_their_tokens() -> None:
    words = [f" {number}" for number in range(40)]
    tokens = [{"token": word, "logprob": -0.1, "bytes": None} for word in words]
    whole = answer({"role": "assistant", "content": "".join(words)})
    whole["choices"][0]["logprobs"] = {"content": tokens, "refusal": None}
    events = answers.payloads(b"".join(WIRE.replay(orjson.dumps(whole), include_usage=False)))
    choices = [orjson.loads(data)["choices"][0] for data in events[:-1]]
    beside = [choice for choice in choices if choice["logprobs"]]
    assert len(beside) == 3
    for choice in beside:
        assert choice["logprobs"].keys() == {"content", "refusal"}
        assert choice["delta"]["content"] == "".join(token["token"] for token in choice["logprobs"]["content"])


def test_a_merged_stream_is_a_chat_completion() -> None:
    whole = merged(
        b"",
        chunk({"role": "assistant", "content": ""}, system_fingerprint="fp", obfuscation="xx", usage=None),
        chunk({"content": "Hel"}, usage=None),
        b"",
        chunk({"content": "lo"}),
        chunk({"content": ""}, finish="stop"),
        orjson.dumps({"id": "c", "choices": [], "usage": USAGE}),
    )
    assert whole == {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "fp",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    ChatCompletion.model_validate(whole)
    assert WIRE.inspect(whole) == Verdict(None, 3, 5)


def test_tool_calls_merge_by_their_index() -> None:
    assert message(
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}]},
        # Some backends repeat the identity with each fragment.
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "[]"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}, {"index": 0, "function": {"arguments": " "}}]},
    ) == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{} "}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "[]"}},
        ],
    }


def test_whole_tool_calls_without_an_index_stay_apart() -> None:
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in ("a", "b")]
    assert message({"tool_calls": [calls[0]]}, {"tool_calls": [calls[1]]})["tool_calls"] == calls


def test_choices_keep_apart_and_come_in_order() -> None:
    whole = merged(
        chunk({"content": "b"}, index=1),
        chunk({"content": "a"}, index=0),
        chunk({"content": "b"}, index=1),
        chunk(finish="stop", index=0),
        chunk(finish="length", index=1),
    )
    said = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]]
    assert said == [(0, "a", "stop"), (1, "bb", "length")]
    assert WIRE.inspect(whole).refusal is NotStored.TRUNCATED


@pytest.mark.parametrize(
    ("deltas", "field", "value"),
    [
        ([{"reasoning_content": "a"}, {"reasoning_content": "a"}], "reasoning_content", "aa"),
        ([{"reasoning": "a"}, {"reasoning": "b"}], "reasoning", "ab"),
        ([{"refusal": "No"}, {"refusal": "."}], "refusal", "No."),
        ([{"vendor_text": "a"}, {"vendor_text": "b"}], "vendor_text", "ab"),
        ([{"vendor_tag": "a"}, {"vendor_tag": "a"}], "vendor_tag", "a"),
        ([{"role": "assistant"}, {"role": "assistant"}], "role", "assistant"),
        ([{"vendor_number": 1}, {"vendor_number": 2}], "vendor_number", 2),
        ([{"vendor_list": [1]}, {"vendor_list": [2]}], "vendor_list", [1, 2]),
        ([{"annotations": [{"type": "x"}]}, {"annotations": [{"type": "x"}]}], "annotations", [{"type": "x"}] * 2),
        (
            [{"function_call": {"name": "f", "arguments": "{"}}, {"function_call": {"arguments": "}"}}],
            "function_call",
            {"name": "f", "arguments": "{}"},
        ),
        (
            [{"audio": {"id": "1", "transcript": "a"}}, {"audio": {"transcript": "b"}}, {"audio": {"data": "eA=="}}],
            "audio",
            {"id": "1", "transcript": "ab", "data": "eA=="},
        ),
        (
            [
                {"reasoning_details": [{"type": "reasoning.text", "index": 0, "text": "a", "format": "f"}]},
                {"reasoning_details": [{"type": "reasoning.text", "index": 0, "text": "b", "format": "f"}]},
            ],
            "reasoning_details",
            [{"type": "reasoning.text", "index": 0, "text": "ab", "format": "f"}],
        ),
    ],
)
def test_fields_merge_as_what_they_are(deltas: list[dict[str, Any]], field: str, value: Any) -> None:
    assert message(*deltas)[field] == value


def test_the_identity_is_the_first_that_a_chunk_tells() -> None:
    filters = {"prompt_filter_results": [{"prompt_index": 0}]}
    opening = orjson.dumps({"id": "", "object": "", "created": 0, "model": "", "choices": [], **filters})
    whole = merged(opening, chunk({"content": "a"}), chunk(finish="stop", id="other"))
    assert (whole["id"], whole["created"], whole["model"], whole["object"]) == ("c", 1, "m", "chat.completion")
    assert whole["prompt_filter_results"] == filters["prompt_filter_results"]


def test_a_message_repeated_beside_the_delta_is_left_out() -> None:
    events = [orjson.loads(chunk({"content": text}, finish=end)) for text, end in (("a", None), ("b", "stop"))]
    events[0]["choices"][0]["message"] = {"content": "a"}
    events[1]["choices"][0]["message"] = {"content": "ab"}
    assert merged(*map(orjson.dumps, events))["choices"][0]["message"]["content"] == "ab"


def test_a_usage_chunk_may_lack_choices() -> None:
    assert merged(chunk({"content": "a"}), chunk(finish="stop"), orjson.dumps({"usage": USAGE}))["usage"] == USAGE


def test_a_finish_without_done_is_an_end() -> None:
    assert WIRE.merge([chunk({"content": "a"}), chunk(finish="stop")])["choices"][0]["message"]["content"] == "a"


@pytest.mark.parametrize(
    "events",
    [
        [],
        [DONE],
        [chunk({"content": "a"})],
        [chunk({"content": "a"}), DONE],
        [chunk({"content": "a"}, index=1), chunk(finish="stop"), DONE],
        [chunk({"content": "a"}), b'{"error": {"message": "out of memory"}}'],
        [chunk({"content": "a"}), b"{", chunk(finish="stop"), DONE],
        [chunk({"content": "a"}), b"[]", chunk(finish="stop"), DONE],
        [chunk({"content": "a"}), b'{"object": "error"}', chunk(finish="stop"), DONE],
        [b'{"choices": [1]}', DONE],
        [b'{"choices": [{"index": "x"}]}', DONE],
        [b'{"choices": [{"index": 0, "finish_reason": "stop"}]}', DONE],
        [b'{"choices": [{"index": 0, "delta": "a", "finish_reason": "stop"}]}', DONE],
        [chunk({"content": "a"}), chunk({"content": ["b"]}), chunk(finish="stop"), DONE],
        [chunk({"tool_calls": ["x"]}), chunk(finish="stop"), DONE],
        [chunk({"tool_calls": [{"index": "x"}]}), chunk(finish="stop"), DONE],
        [b'{"choices": [], "usage": {}}', DONE],
        [b'"\\ud800"', DONE],
        [chunk({"a": 0}).replace(b'"a":0', b'"a":' + DEEP)] * 2 + [chunk(finish="stop"), DONE],
    ],
)
def test_a_broken_stream_is_no_answer(events: list[bytes]) -> None:
    with pytest.raises(BrokenStream):
        WIRE.merge(events)


@pytest.mark.parametrize(
    ("whole", "refusal"),
    [
        (answer(), None),
        (answer(finish="tool_calls", message={"content": None, "tool_calls": [{"id": "1"}]}), None),
        (answer({"content": None, "function_call": {"name": "f"}}, "function_call"), None),
        (answer({"content": None, "refusal": "I will not."}), None),
        (answer({"content": None, "audio": {"id": "1"}}), None),
        (answer({"content": [{"type": "text", "text": "a"}]}), None),
        (answer(finish="length"), NotStored.TRUNCATED),
        (answer(finish="content_filter"), NotStored.FILTERED),
        (answer(finish="abort"), NotStored.MALFORMED),
        (answer(finish=None), NotStored.MALFORMED),
        (answer(finish=7), NotStored.MALFORMED),
        (answer("text"), NotStored.MALFORMED),
        (answer({"content": ""}), NotStored.EMPTY),
        (answer({"content": None, "tool_calls": []}), NotStored.EMPTY),
        (answer({"content": "", "reasoning_content": "hm"}), NotStored.EMPTY),
        (answer(choices=[]), NotStored.EMPTY),
        (answer(choices=[None]), NotStored.MALFORMED),
        (answer(choices=None), NotStored.MALFORMED),
        (answer(choices=answer()["choices"] + answer(finish="length")["choices"]), NotStored.TRUNCATED),
        (answer(error={"message": "x"}), NotStored.ERROR_STATUS),
        (answer({"content": "a", "vendor": orjson.loads(DEEP)}), NotStored.MALFORMED),
        ({}, NotStored.MALFORMED),
        ([], NotStored.MALFORMED),
    ],
)
def test_only_a_whole_answer_is_kept(whole: Any, refusal: NotStored | None) -> None:
    assert WIRE.inspect(whole).refusal is refusal


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": None}, {"prompt_tokens": "3"}, {}])
def test_a_strange_usage_counts_as_nothing(usage: Any) -> None:
    assert WIRE.inspect(answer(usage=usage)) == Verdict(None, 0, 0)


@pytest.mark.parametrize(
    ("payload", "dropped"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":1}}', True),
        (b'{"usage": {"prompt_tokens": 1}, "choices": [ ]}', True),
        (b'{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}', False),
        (b'{"choices":[],"usage":null,"prompt_filter_results":[]}', False),
        (b'{"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}', False),
        (b'{"choices":[{"delta":{"content":"\\"choices\\":[]"}}],"usage":{"prompt_tokens":1}}', False),
        (b'{"choices":[{"vendor":{"choices":[]}}],"usage":{"prompt_tokens":1}}', False),
        (b'{"choices":[]', False),
        (b"[DONE]", False),
    ],
)
def test_only_the_usage_chunk_is_stripped(payload: bytes, dropped: bool) -> None:
    [event] = SseParser().feed(encode(payload))
    assert strip_usage(event) == (None if dropped else event.raw)


def test_a_keep_alive_is_not_stripped() -> None:
    [event] = SseParser().feed(b": ping\n\n")
    assert strip_usage(event) == b": ping\n\n"
