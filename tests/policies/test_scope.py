"""The scope: only the last user text and the exact sampling figures may differ inside one."""

from __future__ import annotations

from typing import Any

import pytest

from policies.canonical import Origin, shaping_fields
from policies.scope import comparable, sampling_class

ORIGIN = Origin("chat", "acme", "pool-a")


def chat(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": role, "content": text} for role, text in turns], **fields}


def scope(body: dict[str, Any], endpoint: str = "chat", embedder: str = "minilm") -> bytes:
    asked = comparable(endpoint, shaping_fields(endpoint, body))
    assert asked is not None
    return asked.scope(ORIGIN, embedder)


def test_questions_of_one_conversation_share_a_scope() -> None:
    assert scope(chat(("user", "one"))) == scope(chat(("user", "two"), temperature=1.0))


@pytest.mark.parametrize(
    "other",
    [
        chat(("system", "be brief"), ("user", "one")),
        chat(("user", "hello"), ("assistant", "hi"), ("user", "one")),
        chat(("user", "one"), tools=[{"type": "function", "function": {"name": "f"}}]),
        chat(("user", "one"), tool_choice="none"),
        chat(("user", "one"), response_format={"type": "json_object"}),
        chat(("user", "one"), max_tokens=5),
        chat(("user", "one"), temperature=0),
        chat(("user", "one"), modalities=["audio"]),
        chat(("user", [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}])),
        {**chat(("user", "one")), "model": "n"},
    ],
)
def test_whatever_else_differs_is_another_scope(other: dict[str, Any]) -> None:
    assert scope(chat(("user", "one"))) != scope(other)


def test_two_images_are_two_scopes() -> None:
    def looking_at(url: str) -> dict[str, Any]:
        return chat(("user", [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]))

    assert scope(looking_at("a")) != scope(looking_at("b"))


def test_vectors_of_two_embedders_never_meet() -> None:
    assert scope(chat(("user", "one"))) != scope(chat(("user", "one")), embedder="other")


def test_earlier_turns_with_the_same_last_turn_do_not_match() -> None:
    assert scope(chat(("user", "a"), ("assistant", "b"), ("user", "continue"))) != scope(
        chat(("user", "a"), ("assistant", "c"), ("user", "continue"))
    )


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("chat", chat(("user", "q"), ("assistant", "a"))),
        ("chat", chat(("user", "q"), ("tool", "result"))),
        ("chat", chat(("user", "  \n"))),
        ("chat", chat(("user", [{"type": "image_url", "image_url": {"url": "x"}}]))),
        ("chat", {"model": "m", "messages": []}),
        ("chat", {"model": "m", "messages": "hello"}),
        ("chat", {"model": "m", "messages": ["hello"]}),
        ("chat", {"model": "m"}),
        ("completions", {"model": "m", "prompt": "q"}),
        ("embeddings", {"model": "m", "input": "q"}),
        ("responses", {"model": "m", "input": [{"type": "function_call_output", "output": "x"}]}),
    ],
)
def test_calls_without_a_last_user_text_are_not_compared(endpoint: str, body: dict[str, Any]) -> None:
    assert comparable(endpoint, body) is None


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = comparable("chat", chat(("user", parts)))
    assert asked is not None
    assert asked.text == "one\ntwo"


def test_responses_input_is_compared_in_both_forms() -> None:
    plain = comparable("responses", {"model": "m", "input": "q"})
    items = comparable(
        "responses",
        {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]},
    )
    assert plain is not None
    assert items is not None
    assert plain.text == items.text == "q"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "balanced"),
        ({"temperature": 0}, "greedy"),
        ({"temperature": 1.5, "top_k": 1}, "greedy"),
        ({"temperature": 0.3}, "focused"),
        ({"temperature": 1}, "balanced"),
        ({"temperature": 1.8}, "creative"),
        ({"temperature": "hot"}, "balanced"),
    ],
)
def test_sampling_class(fields: dict[str, Any], expected: str) -> None:
    assert sampling_class(fields) == expected
