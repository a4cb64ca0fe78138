"""Requests that are refused, each naming its field, and those that are taken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.checkpoint import SamplingDefaults
from engine.errors import RequestError
from engine.requests import parse_body, parse_chat, parse_completion

USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [3]}, "messages"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages"),
        ({"messages": [USER], "model": 3}, "model"),
        ({"messages": [USER], "temperature": -0.1}, "temperature"),
        ({"messages": [USER], "temperature": 2.1}, "temperature"),
        ({"messages": [USER], "temperature": "hot"}, "temperature"),
        ({"messages": [USER], "top_p": 0}, "top_p"),
        ({"messages": [USER], "top_k": -2}, "top_k"),
        ({"messages": [USER], "top_k": 1.5}, "top_k"),
        ({"messages": [USER], "seed": 2**63}, "seed"),
        ({"messages": [USER], "n": 0}, "n"),
        ({"messages": [USER], "n": True}, "n"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens"),
        ({"messages": [USER], "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": [USER], "presence_penalty": 3}, "presence_penalty"),
        ({"messages": [USER], "frequency_penalty": -3}, "frequency_penalty"),
        ({"messages": [USER], "stop": ""}, "stop"),
        ({"messages": [USER], "stop": ["a"] * 17}, "stop"),
        ({"messages": [USER], "stream": "yes"}, "stream"),
        ({"messages": [USER], "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [USER], "logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": [USER], "logit_bias": {"1": 101}}, "logit_bias"),
        ({"messages": [USER], "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"messages": [USER], "min_p": 1.5}, "min_p"),
        ({"messages": [USER], "repetition_penalty": 0}, "repetition_penalty"),
        ({"messages": [USER], "stop": ["x" * 2000]}, "stop"),
        ({"messages": [USER], "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"messages": [USER], "stop_token_ids": 3}, "stop_token_ids"),
        ({"messages": [USER], "min_tokens": -1}, "min_tokens"),
        ({"messages": [USER], "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"messages": [USER], "cache_salt": ""}, "cache_salt"),
        ({"messages": [USER], "response_format": {"type": "yaml"}}, "response_format"),
        ({"messages": [USER], "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": [USER], "response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format"),
        (
            {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": ""}}},
            "response_format",
        ),
        ({"messages": [USER], "response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [USER], "response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"messages": [USER], "guided_json": {}}, "guided_json"),
        ({"messages": [USER], "structured_outputs": {}}, "structured_outputs"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"messages": [USER], "tools": [{"type": "web_search"}]}, "tools"),
        ({"messages": [USER], "tools": [TOOL, TOOL]}, "tools"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [USER], "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        (
            {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"messages": [USER], "tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [USER], "reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": [USER], "frobnicate": 1}, "frobnicate"),
    ],
)
def test_a_wrong_chat_request_names_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_chat(body)
    assert refused.value.param == param
    assert refused.value.status == 400
    assert refused.value.message.startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_completion_request_names_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_completion(body)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"a": "\\ud800"}', b"[" * 5000, b'{"a": NaN}'])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        parse_body(body)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_in_every_form(prompt: object, read: object) -> None:
    if prompt == [1, 2]:
        assert parse_completion({"prompt": prompt}).prompt == read
    assert parse_completion({"prompt": prompt}).prompt == read


def test_what_cannot_change_the_answer_is_ignored_and_null_is_absent() -> None:
    asked = parse_chat(
        {
            "messages": [USER],
            "user": "me",
            "metadata": {"a": "b"},
            "store": True,
            "temperature": None,
            "stop": None,
            "n": None,
            "tools": None,
            "tool_choice": None,
            "response_format": None,
            "min_tokens": None,
        }
    )
    params = asked.sampling(SamplingDefaults(temperature=0.7, top_k=5), max_tokens=9, logprobs=None, vocab_size=10)
    assert (params.temperature, params.top_k, params.max_tokens, params.stop) == (0.7, 5, 9, ())
    assert asked.choices == 1


def test_each_choice_has_its_own_seed() -> None:
    asked = parse_chat({"messages": [USER], "seed": 5, "n": 2})
    seeds = [
        asked.sampling(SamplingDefaults(), max_tokens=9, logprobs=None, vocab_size=10, choice=i).seed for i in range(2)
    ]
    assert seeds == [5, 6]


def test_messages_reach_the_template_flat_and_with_decoded_arguments() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": 1})}}
    asked = parse_chat(
        {"messages": [{"role": "user", "content": parts, "name": None}, {"role": "assistant", "tool_calls": [call]}]}
    )
    user, assistant = (message.for_template() for message in asked.messages)
    assert user == {"role": "user", "content": "a\nb"}
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_arguments_that_cannot_be_decoded_stay_text() -> None:
    for arguments in ("{", "[" * 5000 + "]" * 5000, 3):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        asked = parse_chat({"messages": [{"role": "assistant", "tool_calls": [call]}]})
        decoded = asked.messages[0].for_template()["tool_calls"][0]["function"]["arguments"]
        assert decoded == arguments


def test_the_limit_by_either_name() -> None:
    assert parse_chat({"messages": [USER]}).limit is None
    assert parse_chat({"messages": [USER], "max_tokens": 3}).limit == 3
    assert parse_chat({"messages": [USER], "max_tokens": 3, "max_completion_tokens": 5}).limit == 5
    assert parse_completion({"prompt": "a"}).limit == 16


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_token_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    asked = parse_chat({"messages": [USER], field: {"10": 1} if field == "logit_bias" else [10]})
    with pytest.raises(RequestError) as refused:
        asked.sampling(SamplingDefaults(), max_tokens=9, logprobs=None, vocab_size=10)
    assert refused.value.param == field
    asked.sampling(SamplingDefaults(), max_tokens=9, logprobs=None, vocab_size=11)


def test_fields_beyond_openais_reach_the_sampler() -> None:
    fields = {"min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [3], "min_tokens": 2, "ignore_eos": True}
    asked = parse_completion({"prompt": "a", **fields})
    params = asked.sampling(SamplingDefaults(min_tokens=1), max_tokens=9, logprobs=None, vocab_size=10)
    assert (params.min_p, params.repetition_penalty, params.stop_token_ids) == (0.1, 1.2, (3,))
    assert (params.min_tokens, params.ignore_eos) == (2, True)


def test_a_form_decides_when_the_answer_ends() -> None:
    asked = parse_chat({"messages": [USER], "response_format": {"type": "json_object"}})
    assert asked.constrained
    assert asked.schema_wanted == {"type": "object"}
    params = asked.sampling(SamplingDefaults(min_tokens=5), max_tokens=9, logprobs=None, vocab_size=10)
    assert params.min_tokens == 0


@pytest.mark.parametrize(
    ("choice", "names", "must_call", "several", "shown"),
    [
        (None, ["f", "g"], False, True, True),
        ("auto", ["f", "g"], False, True, True),
        ("none", [], False, True, False),
        ("required", ["f", "g"], True, True, True),
        ({"type": "function", "function": {"name": "g"}}, ["g"], True, False, True),
    ],
)
def test_which_tools_may_be_called(
    choice: object, names: list[str], must_call: bool, several: bool, shown: bool
) -> None:
    tools = [TOOL, {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}]
    asked = parse_chat({"messages": [USER], "tools": tools, "tool_choice": choice})
    assert [function.name for function in asked.functions] == names
    assert (asked.must_call, asked.several_calls) == (must_call, several)
    assert asked.tools_for_template() == (tools if shown else None)
