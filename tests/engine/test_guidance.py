"""Grammars over a real vocabulary: what may come next, and what can never come."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from engine import guidance
from engine.checkpoint import BUNDLED
from engine.errors import RequestError
from engine.guidance import Grammar, Guidance, GuidanceError, Guide
from engine.requests import ChatRequest, parse_chat
from engine.tokenizer import ChatTokenizer, load_tokenizer
from engine.tools import Call, CallScanner
from tests.engine import checkpoints

VOCABULARY = 4100
"""A few more than the tokenizer has, as padded embeddings do."""
END = 1

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "person", "parameters": PERSON},
    {"name": "tree", "parameters": {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "maxProperties": 0}}}},
    {"name": "now"},
]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def compiler(tokenizer: ChatTokenizer) -> Guidance:
    return Guidance(tokenizer, VOCABULARY, [END])


def asked(**fields: Any) -> ChatRequest:
    return parse_chat({"messages": [{"role": "user", "content": "x"}], **fields})


def schema_asked(schema: dict[str, Any]) -> ChatRequest:
    return asked(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})


def allowed(guide: Guide) -> list[int]:
    words = guide.mask()
    assert words.dtype == torch.int32
    assert words.shape == ((VOCABULARY + 31) // 32,)
    bits = (words[:, None] >> torch.arange(32)) & 1
    return [int(i) for i in bits.flatten().nonzero().flatten()]


def follow(guide: Guide, tokens: list[int]) -> None:
    for token in tokens:
        assert token in allowed(guide)
        guide.advance(token)


def wander(guide: Guide, tokenizer: ChatTokenizer, seed: int, limit: int = 300) -> str | None:
    """Text of a random way through a grammar, None where it found no end."""
    chance, ids = random.Random(seed), list[int]()
    for _ in range(limit):
        if guide.finished:
            break
        choices = allowed(guide)
        # Short tokens and the end are likelier, as from a model that wants to be done.
        token = END if END in choices else min(chance.choices(choices, k=4), key=lambda i: len(tokenizer.spelled(i)[0]))
        guide.advance(token)
        if token == END:
            break
        ids.append(token)
    else:
        return None
    return tokenizer.decode(ids)


def grammar(compiler: Guidance, request: ChatRequest) -> Grammar:
    found = compiler.wanted(request)
    assert found is not None
    return found


def test_without_a_form_there_is_no_grammar(compiler: Guidance) -> None:
    assert compiler.wanted(asked()) is None
    assert compiler.wanted(asked(response_format={"type": "text"})) is None


def test_only_what_fits_may_come_and_at_the_end_only_the_end(compiler: Guidance, tokenizer: ChatTokenizer) -> None:
    guide = grammar(compiler, asked(response_format={"type": "json_object"})).guide()
    first = {tokenizer.spelled(token)[0] for token in allowed(guide)}
    assert "{" in first
    assert all(text.startswith("{") for text in first)
    follow(guide, tokenizer.encode_text('{"a": [1, "é漢"]}'))
    assert guide.finished
    assert allowed(guide) == [END]
    guide.advance(END)
    assert guide.finished


def test_special_tokens_never_stand_inside(compiler: Guidance, tokenizer: ChatTokenizer) -> None:
    guide = grammar(compiler, asked(response_format={"type": "json_object"})).guide()
    follow(guide, tokenizer.encode_text('{"text'))
    assert not any(tokenizer.silent(token) for token in allowed(guide))
    assert max(allowed(guide)) < tokenizer.size


def test_a_token_that_does_not_fit_is_an_error(compiler: Guidance, tokenizer: ChatTokenizer) -> None:
    guide = grammar(compiler, asked(response_format={"type": "json_object"})).guide()
    with pytest.raises(GuidanceError):
        guide.advance(tokenizer.encode_text("x")[0])
    with pytest.raises(GuidanceError):
        guide.mask()


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_any_way_through_a_schema_follows_it(compiler: Guidance, tokenizer: ChatTokenizer, seed: int) -> None:
    text = wander(grammar(compiler, schema_asked(PERSON)).guide(), tokenizer, seed)
    assert text is not None
    person = json.loads(text)
    assert list(person) == ["name", "age"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 8
    assert isinstance(person["age"], int)


def test_guides_of_one_grammar_do_not_meet(compiler: Guidance, tokenizer: ChatTokenizer) -> None:
    shared = grammar(compiler, schema_asked(PERSON))
    assert grammar(compiler, schema_asked(PERSON)) is shared
    one, other = shared.guide(), shared.guide()
    follow(one, tokenizer.encode_text('{"name": "a", "age": 7}'))
    follow(other, tokenizer.encode_text('{"name": "b"'))
    assert not other.finished


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "frob"}, "Invalid type: frob"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"$ref": "https://example.com/schema"}, "does not fetch"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"enum": []}, "Unsatisfiable"),
        ({"enum": ["x" * guidance.MAX_SCHEMA]}, "at most"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_in_the_librarys_words(
    compiler: Guidance, schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        compiler.wanted(schema_asked(schema))
    assert refused.value.param == "response_format"
    assert "x-guidance" not in refused.value.message


def test_a_deep_schema_is_refused(compiler: Guidance) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="response_format"):
        compiler.wanted(schema_asked(schema))


def test_only_so_many_grammars_are_kept(tokenizer: ChatTokenizer) -> None:
    compiler = Guidance(tokenizer, VOCABULARY, [END], kept=1000)
    first = grammar(compiler, schema_asked({"enum": ["first" * 50]}))
    for i in range(4):
        grammar(compiler, schema_asked({"enum": [f"{i}" * 250]}))
    assert grammar(compiler, schema_asked({"enum": ["first" * 50]})) is not first


def test_a_model_without_an_end_cannot_be_guided(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(RequestError, match="no end token"):
        Guidance(tokenizer, VOCABULARY, []).wanted(schema_asked(PERSON))


FAMILIES = {
    "hermes": ("{# tools <tool_call> #}", [AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")]),
    "llama": ("{# tools #}", [AddedToken("<|python_tag|>", special=True)]),
    "mistral": ("{# tools #}", [AddedToken("[TOOL_CALLS]", special=True)]),
    "mistral-args": ("{# tools #}", [AddedToken(tag, special=True) for tag in ("[TOOL_CALLS]", "[ARGS]")]),
}


def with_tools(directory: Path, family: str) -> ChatTokenizer:
    template, added = FAMILIES[family]
    checkpoints.write_tokenizer(directory, template=template)
    path = directory / "tokenizer.json"
    edited = Tokenizer.from_file(str(path))
    edited.add_tokens(added)
    edited.save(str(path))
    return load_tokenizer(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "person"}}])
def test_a_required_call_is_a_call_of_a_tool_with_fitting_arguments(
    family: str, choice: object, tmp_path: Path
) -> None:
    tokenizer = with_tools(tmp_path, family)
    assert tokenizer.tools is not None
    assert tokenizer.tools.name == family
    request = asked(
        tools=[{"type": "function", "function": function} for function in FUNCTIONS],
        tool_choice=choice,
        parallel_tool_calls=False,
    )
    compiler = Guidance(tokenizer, tokenizer.size, [257])
    found = grammar(compiler, request)
    for seed in range(3):
        chance, guide, ids = random.Random(seed), found.guide(), list[int]()
        while not guide.finished and len(ids) < 400:
            token = chance.choice(allowed_in(guide, tokenizer.size))
            guide.advance(token)
            ids.append(token)
        scanner = CallScanner(tokenizer.tools, [function["name"] for function in FUNCTIONS])
        pieces = [*scanner.push(tokenizer.decode(ids)), *scanner.flush()]
        if not guide.finished:
            continue
        (call,) = pieces
        assert isinstance(call, Call)
        arguments = json.loads(call.arguments)
        match call.name:
            case "person":
                assert list(arguments) == ["name", "age"]
            case "tree" | "now":
                assert choice == "required"
                assert arguments == {}
            case other:
                raise AssertionError(other)


def allowed_in(guide: Guide, size: int) -> list[int]:
    bits = (guide.mask()[:, None] >> torch.arange(32)) & 1
    ids = bits.flatten()[:size].nonzero().flatten().tolist()
    return [int(i) for i in ids if i != 257] or [257]


def test_a_schema_beside_tools_leaves_the_choice(tmp_path: Path) -> None:
    tokenizer = with_tools(tmp_path, "hermes")
    compiler = Guidance(tokenizer, tokenizer.size, [257])
    request = asked(
        tools=[{"type": "function", "function": FUNCTIONS[2]}],
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}},
    )
    found = grammar(compiler, request)
    for text in ("42", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        guide = found.guide()
        for token in tokenizer.encode_text(text):
            guide.advance(token)
    with pytest.raises(GuidanceError):
        found.guide().advance(tokenizer.encode_text("x")[0])


def test_calls_cannot_be_required_of_a_model_whose_format_is_not_known(compiler: Guidance) -> None:
    tools = [{"type": "function", "function": FUNCTIONS[2]}]
    with pytest.raises(RequestError) as refused:
        compiler.wanted(asked(tools=tools, tool_choice="required"))
    assert refused.value.param == "tool_choice"
