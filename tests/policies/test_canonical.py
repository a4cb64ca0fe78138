"""The exact key: what must change it, and what must not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.canonical import CanonicalError, Origin, digest, shaping_fields

ORIGIN = Origin("chat", "acme", "pool-a")

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
bodies = st.dictionaries(st.text(max_size=8), values, max_size=6)


def key(body: dict[str, Any], origin: Origin = ORIGIN) -> bytes:
    return digest(origin, shaping_fields(origin.endpoint, body))


def shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        names = list(value)
        order.shuffle(names)
        return {name: shuffled(value[name], order) for name in names}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@given(bodies, st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(body: dict[str, Any], order: random.Random) -> None:
    assert key(body) == key(shuffled(body, order))


@given(bodies)
def test_white_space_and_escapes_do_not_matter(body: dict[str, Any]) -> None:
    spaced = orjson.loads(json.dumps(body, indent=3, ensure_ascii=True).encode())
    assert key(body) == key(spaced)


@given(bodies, st.sampled_from(["stream", "stream_options", "user", "metadata", "store", "service_tier"]), values)
def test_delivery_and_bookkeeping_do_not_matter(body: dict[str, Any], name: str, value: Any) -> None:
    assert key({**body, name: value}) == key({other: item for other, item in body.items() if other != name})


@given(bodies, st.text(max_size=8))
def test_null_means_absent(body: dict[str, Any], name: str) -> None:
    assert key({**body, name: None}) == key({other: item for other, item in body.items() if other != name})


QUESTION: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
    "temperature": 0.7,
}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]},
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "user", "content": "s"}, {"role": "system", "content": "q"}]},
        {"temperature": 0.8},
        {"temperature": 0},
        {"top_p": 0.9},
        {"seed": 1},
        {"max_tokens": 5},
        {"n": 2},
        {"stop": ["x"]},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "none"},
        {"response_format": {"type": "json_object"}},
        {"reasoning_effort": "low"},
        {"logit_bias": {"5": 1}},
        {"a_vendors_own_field": 1},
    ],
)
def test_what_shapes_the_answer_changes_the_key(change: dict[str, Any]) -> None:
    assert key(QUESTION) != key({**QUESTION, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "completions"},
        {"namespace": "other"},
        {"backend": "pool-b"},
        {"query": "api-version=2"},
        {"headers": (("openai-organization", "o"),)},
    ],
)
def test_where_the_call_comes_from_and_goes_to_changes_the_key(change: dict[str, Any]) -> None:
    assert key(QUESTION) != key(QUESTION, replace(ORIGIN, **change))


def test_equal_numbers_are_one_number() -> None:
    assert key({"temperature": 1, "x": [{"y": 2.0}]}) == key({"temperature": 1.0, "x": [{"y": 2}]})
    assert key({"temperature": True}) != key({"temperature": 1})


def test_numbers_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(CanonicalError, match="too large"):
        key({"seed": orjson.loads("123456789012345678901234567890")})


def test_a_body_nested_too_deeply_is_refused() -> None:
    deep = orjson.loads(b"[" * 900 + b"]" * 900)
    with pytest.raises((CanonicalError, RecursionError)):
        key({"x": deep})


def test_responses_echo_their_bookkeeping_so_it_is_part_of_the_key() -> None:
    origin = replace(ORIGIN, endpoint="responses")
    assert key({"input": "q", "metadata": {"a": "1"}}, origin) != key({"input": "q"}, origin)
    assert key({"input": "q", "stream": True}, origin) == key({"input": "q"}, origin)
