from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings

from gateway.wire import BrokenStream, Verdict
from gateway.wire.completions import CompletionsWire
from gateway.wire.sse import DONE
from policies.reasons import NotStored
from tests.gateway.wire import answers

WIRE = CompletionsWire()
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def answer(text: Any = "a", finish: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": USAGE, **more}


def chunk(text: str, finish: str | None = None, index: int = 0, logprobs: Any = None) -> bytes:
    choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
    return orjson.dumps({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


@settings(max_examples=60)
@given(answers.completions)
def test_an_answer_survives_being_read_as_a_stream(whole: dict[str, Any]) -> None:
    events = list(WIRE.replay(orjson.dumps(whole), include_usage=True))
    payloads = answers.payloads(b"".join(events))
    assert WIRE.merge(payloads) == whole
    assert payloads.pop() == DONE
    assert orjson.loads(payloads[-1])["choices"] == []
    assert all(len(event) < 65536 for event in events)
    without = answers.payloads(b"".join(WIRE.replay(orjson.dumps(whole), include_usage=False)))
    assert all("usage" not in orjson.loads(data) for data in without[:-1])


def test_chunks_add_up_by_choice() -> None:
    first = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]}
    second = {"tokens": ["b"], "token_logprobs": [-2.0], "top_logprobs": [{"b": -2.0}], "text_offset": [1]}
    whole = WIRE.merge(
        [
            chunk("a", logprobs=first),
            chunk("x", index=1),
            chunk("b", logprobs=second, finish="stop"),
            chunk("", index=1, finish="stop"),
            orjson.dumps({"choices": [], "usage": USAGE}),
            DONE,
        ]
    )
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0}, {"b": -2.0}],
        "text_offset": [0, 1],
    }
    assert whole["choices"] == [
        {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": logprobs},
        {"index": 1, "text": "x", "finish_reason": "stop", "logprobs": None},
    ]
    assert WIRE.inspect(whole) == Verdict(None, 3, 5)


def test_a_stream_that_was_cut_is_no_answer() -> None:
    with pytest.raises(BrokenStream):
        WIRE.merge([chunk("a")])


@pytest.mark.parametrize(
    ("whole", "refusal"),
    [
        (answer(), None),
        (answer(finish="length"), NotStored.TRUNCATED),
        (answer(finish="content_filter"), NotStored.FILTERED),
        (answer(finish=None), NotStored.MALFORMED),
        (answer(None), NotStored.MALFORMED),
        (answer(""), NotStored.EMPTY),
        (answer(choices=[]), NotStored.EMPTY),
        ({"error": {"message": "x"}}, NotStored.ERROR_STATUS),
    ],
)
def test_only_a_whole_answer_is_kept(whole: Any, refusal: NotStored | None) -> None:
    assert WIRE.inspect(whole).refusal is refusal
