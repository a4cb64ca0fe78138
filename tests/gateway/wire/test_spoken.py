"""What a model said, without the envelope around it."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.wire.spoken import spoken, strings


@pytest.mark.parametrize(
    ("endpoint", "answer", "expected"),
    [
        (
            "chat",
            {
                "id": "chatcmpl-4111111111111111",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"},
                    {"index": 1, "message": {"role": "assistant", "content": "Lyon."}, "finish_reason": "stop"},
                ],
            },
            "Paris.\nLyon.",
        ),
        (
            "chat",
            {
                "choices": [
                    {"message": {"tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}]}}
                ]
            },
            "f\n{}",
        ),
        ("completions", {"id": "cmpl-1", "choices": [{"text": "and then", "finish_reason": "stop"}]}, "and then"),
        (
            "responses",
            {
                "id": "resp_1",
                "instructions": "not said",
                "output": [
                    {"id": "msg_1", "content": [{"type": "output_text", "text": "Hello."}], "role": "assistant"}
                ],
            },
            "Hello.",
        ),
        ("embeddings", {"data": [{"index": 0, "embedding": [0.5]}]}, '[{"index":0,"embedding":[0.5]}]'),
        ("chat", {}, ""),
    ],
)
def test_only_the_models_words(endpoint: str, answer: dict[str, Any], expected: str) -> None:
    assert spoken(endpoint, answer) == expected


def test_every_string_of_a_request() -> None:
    assert list(strings({"a": ["x", {"b": "y"}], "c": 1, "d": None, "e": "z"})) == ["x", "y", "z"]
