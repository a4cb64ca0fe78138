"""Tool calls in the families' own words: found wherever the text is cut, and never at the cost of text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tools import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, Call, CallScanner, Piece, ToolFormat, detect

NAMES = ("weather", "add")
WEATHER = Call("weather", '{"at": "Ulm"}')
ADD = Call("add", '{"a": 1, "b": [2.5, {"c": "}\\"]"}]}')


def written(call: Call, key: str = "arguments") -> str:
    return f'{{"name": "{call.name}", "{key}": {call.arguments}}}'


HERMES_WEATHER = f"<tool_call>\n{written(WEATHER)}\n</tool_call>"
HERMES_ADD = f"<tool_call>\n{written(ADD)}\n</tool_call>"
TAGS_INSIDE = Call("add", '{"x": "</tool_call><tool_call>"}')

RECORDED: list[tuple[ToolFormat, str, str, list[Call]]] = [
    (HERMES, HERMES_WEATHER, "", [WEATHER]),
    (HERMES, f"Let me look.\n\n{HERMES_WEATHER}\n{HERMES_ADD}\n", "Let me look.", [WEATHER, ADD]),
    (HERMES, f"<tool_call>{written(TAGS_INSIDE)}</tool_call> Done.", " Done.", [TAGS_INSIDE]),
    (HERMES, f"<tool_call>\n{written(WEATHER)}", "", [WEATHER]),
    (HERMES, f"<tool_call>\n{written(WEATHER)}\n</tool", "\n</tool", [WEATHER]),
    (HERMES, "<think>\nhm\n</think>\n\n" + HERMES_ADD, "<think>\nhm\n</think>", [ADD]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [Call("add", '{"a": 1}')]),
    (HERMES, 'é 😀 <tool_call>{"name":"add","arguments":{"ü":"漢"}}</tool_call>', "é 😀", [Call("add", '{"ü": "漢"}')]),
    (LLAMA, written(WEATHER, "parameters"), "", [WEATHER]),
    (LLAMA, f"\n<|python_tag|>{written(ADD, 'parameters')}", "", [ADD]),
    (
        LLAMA,
        f"<|python_tag|>{written(ADD, 'parameters')}; {written(WEATHER, 'parameters')}",
        "",
        [ADD, WEATHER],
    ),
    (LLAMA, f'{{"type": "function", {written(WEATHER, "parameters")[1:]}', "", [WEATHER]),
    (MISTRAL, f"[TOOL_CALLS][{written(WEATHER)}]", "", [WEATHER]),
    (MISTRAL, f"Yes. [TOOL_CALLS] [{written(WEATHER)}, {written(ADD)}]", "Yes.", [WEATHER, ADD]),
    (MISTRAL_ARGS, f"[TOOL_CALLS]weather[ARGS]{WEATHER.arguments}", "", [WEATHER]),
    (
        MISTRAL_ARGS,
        f"Two.[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{ADD.arguments}[TOOL_CALLS]weather[ARGS]{WEATHER.arguments}",
        "Two.",
        [ADD, WEATHER],
    ),
]

PLAIN: list[tuple[ToolFormat, str]] = [
    (HERMES, "  no call at all \n"),
    (HERMES, "a <tool_call> in passing"),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"at": }}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"at": "Ul'),
    (HERMES, '<tool_call>{"name": "weather"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "no name!", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>'),
    (HERMES, "<tool_call>[1]</tool_call> \n <tool_"),
    (HERMES, '<tool_call>{"name": "add", "arguments": ' + "[" * 3000 + "]" * 3000 + "}</tool_call>"),
    (LLAMA, '{"name": "Bob", "parameters": {}}'),
    (LLAMA, '{"answer": 42} and more'),
    (LLAMA, "<|python_tag|>print(1)"),
    (LLAMA, 'Sure: {"name": "add", "parameters": {}}'),
    (MISTRAL, "[TOOL_CALLS] []"),
    (MISTRAL, "[TOOL_CALLS]weather"),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {}}, 3]'),
    (MISTRAL_ARGS, "[TOOL_CALLS]weather[ARGS]no"),
    (MISTRAL_ARGS, "[TOOL_CALLS]wéather[ARGS]{}"),
    (MISTRAL_ARGS, "[TOOL_CALLS]" + "a" * 300),
]


def scan(form: ToolFormat, pieces: Iterable[str], *, parallel: bool = True) -> tuple[str, list[Call]]:
    scanner = CallScanner(form, NAMES, parallel=parallel)
    found: list[Piece] = [out for piece in pieces for out in scanner.push(piece)]
    found += scanner.flush()
    calls = [piece for piece in found if isinstance(piece, Call)]
    assert scanner.calls == len(calls)
    return "".join(piece for piece in found if isinstance(piece, str)), calls


@pytest.mark.parametrize(("form", "text", "shown", "calls"), RECORDED)
def test_recorded_answers(form: ToolFormat, text: str, shown: str, calls: list[Call]) -> None:
    assert scan(form, [text]) == (shown, calls)


@pytest.mark.parametrize(("form", "text"), PLAIN)
def test_what_is_no_call_is_text_to_the_last_character(form: ToolFormat, text: str) -> None:
    assert scan(form, [text]) == (text, [])


@pytest.mark.parametrize(("form", "text"), [row[:2] for row in RECORDED] + [row for row in PLAIN if len(row[1]) < 500])
def test_cut_anywhere_it_reads_the_same(form: ToolFormat, text: str) -> None:
    whole = scan(form, [text])
    assert scan(form, text) == whole
    for at in range(len(text)):
        assert scan(form, [text[:at], text[at:]]) == whole


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", ";", "\n", " ", "x"),
        *("add", "{", "}", "[", "]", '"', "\\", "<", "{}", written(WEATHER), written(WEATHER, "parameters")),
        *(f"[{written(ADD)}]", HERMES_ADD, "é"),
    ]
)


@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL, MISTRAL_ARGS]),
    st.lists(FRAGMENTS, max_size=12).map("".join),
    st.lists(st.integers(0, 500), max_size=6),
)
@settings(max_examples=300)
def test_any_text_cut_anywhere_reads_the_same(form: ToolFormat, text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    whole = scan(form, [text])
    assert scan(form, [text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert scan(form, text) == whole
    if not whole[1]:
        assert whole[0] == text


def test_without_parallel_calls_only_the_first_is_given() -> None:
    assert scan(HERMES, [HERMES_WEATHER + HERMES_ADD], parallel=False) == ("", [WEATHER])
    assert scan(MISTRAL, [f"[TOOL_CALLS][{written(ADD)}, {written(WEATHER)}]"], parallel=False) == ("", [ADD])


def test_text_before_a_call_is_not_held_back() -> None:
    scanner = CallScanner(HERMES, NAMES)
    assert scanner.push("Let me ") == ["Let me"]
    assert scanner.push("look <") == [" look"]
    assert scanner.push("b>") == [" <b>"]


def test_a_long_call_is_read_in_one_pass() -> None:
    call = Call("add", json.dumps({"text": "word {[ " * 20_000}))
    scanner = CallScanner(HERMES, NAMES)
    found = [out for letter in f"<tool_call>{written(call)}" for out in scanner.push(letter)]
    assert found == [call]


@pytest.mark.parametrize(
    ("template", "added", "form"),
    [
        (None, ["[TOOL_CALLS]"], None),
        ("{{ messages }}", ["[TOOL_CALLS]"], None),
        ("{% if tools %}<tool_call>{% endif %}", ["<|im_end|>"], HERMES),
        ("{% if tools %}<tool_call><function=x>{% endif %}", [], None),
        ("{% if tools %}{% endif %}", ["[TOOL_CALLS]"], MISTRAL),
        ("{% if tools %}{% endif %}", ["[TOOL_CALLS]", "[ARGS]"], MISTRAL_ARGS),
        ("{% if tools %}{% endif %}", ["<|python_tag|>"], LLAMA),
        ("{% if tools %}{% endif %}", ["<|end|>"], None),
    ],
)
def test_the_format_is_told_from_template_and_tokens(
    template: str | None, added: list[str], form: ToolFormat | None
) -> None:
    assert detect(template, added) == form


def test_ids_are_what_the_family_takes() -> None:
    assert len(MISTRAL.new_id()) == 9
    assert MISTRAL.new_id().isalnum()
    assert HERMES.new_id().startswith("call_")
    assert HERMES.new_id() != HERMES.new_id()
