"""Last turns that lean on what went before them are kept exact; steps of an agent are never compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.data import DataError, data_dir, read_rows
from policies.canonical import Origin, digest, shaping_fields
from policies.context import ContextRules, Leaning, first_turn, in_loop, kept_exact, leaning
from policies.scope import comparable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("continue", Leaning.CONTINUATION),
        ("Continue.", Leaning.CONTINUATION),
        ("yes please", Leaning.CONTINUATION),
        ("ok, go on!", Leaning.CONTINUATION),
        ("mach weiter", Leaning.CONTINUATION),
        ("继续", Leaning.CONTINUATION),
        ("続けて", Leaning.CONTINUATION),
        ("продолжай", Leaning.CONTINUATION),
        ("Why?", Leaning.CONTINUATION),
        ("...", Leaning.CONTINUATION),
        ("2", Leaning.CONTINUATION),
        ("option b)", Leaning.CONTINUATION),
        ("👍", Leaning.CONTINUATION),
        ("and in Germany?", Leaning.ELLIPSIS),
        ("Und in Frankreich?", Leaning.ELLIPSIS),
        ("What about Canada?", Leaning.ELLIPSIS),
        ("et pour les enfants ?", Leaning.ELLIPSIS),
        ("那德国呢？", Leaning.ELLIPSIS),
        ("in French", Leaning.ELLIPSIS),
        ("the second one", Leaning.REFERENCE),
        ("Tell me more about the latter", Leaning.REFERENCE),
        ("Explain this to a child", Leaning.REFERENCE),
        ("why is that?", Leaning.REFERENCE),
        ("How old is he?", Leaning.REFERENCE),
        ("Where was she born", Leaning.REFERENCE),
        ("Can you summarize it in one sentence?", Leaning.REFERENCE),
        ("Rewrite your answer as a list", Leaning.REFERENCE),
        ("As you said, prices went up. By how much?", Leaning.REFERENCE),
        ("That does not work", Leaning.REFERENCE),
        ("Always give one action. I found 3. " * 5 + "Please review your output.", Leaning.REFERENCE),
        ("<returncode>0</returncode>\n<output>\nok\n</output>", Leaning.TOOL_RESULT),
        ("Observation: 3 files changed", Leaning.TOOL_RESULT),
        ('{"status": "ok"}', Leaning.TOOL_RESULT),
        ("User: hi\nAssistant: hello\nUser: what now?", Leaning.TRANSCRIPT),
        ("word " * 1000, Leaning.LONG),
    ],
)
def test_what_leans(text: str, expected: Leaning) -> None:
    assert leaning(text, first=True) is expected
    assert leaning(text, first=False) is not None


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "How do I reset my password?",
        "Is it safe to eat raw eggs?",
        "My dog ate chocolate. Is it dangerous?",
        "How do I sort a list in Python and reverse it?",
        "Who was Ada Lovelace and when did she die?",
        "weather in Berlin",
        "Germany",
        "how to boil an egg",
        "Wie lange kocht man ein Ei?",
        "What if the sun disappeared?",
        "法国的首都是哪里？",
        "Is it a good idea to go to law school if you don't want to be a lawyer?",
        "What is gravity? Is it a wave?",
        "Kleptomania, can it be passed down in the genes?",
        "Tyrion changes his face mask two times every time he goes out. How many face masks does he need in a month?",
    ],
)
def test_what_stands_alone(text: str) -> None:
    assert leaning(text, first=True) is None


def test_a_bare_noun_stands_alone_only_at_the_start() -> None:
    assert leaning("Germany", first=True) is None
    assert leaning("Germany", first=False) is Leaning.ELLIPSIS


@given(st.text(max_size=100), st.booleans())
def test_any_text_is_judged_or_declined(text: str, first: bool) -> None:
    assert leaning(text, first=first) in {None, *Leaning}


@pytest.mark.parametrize(
    "text", ["\ud800", "\ud800 what is this \udfff", "ا" * 50, "\x00", "1234567890 " * 20, "🙂" * 500]
)
def test_odd_texts_are_no_exception(text: str) -> None:
    leaning(text, first=True)


def test_long_texts_are_declined_at_once() -> None:
    assert leaning("x" * 5_000_000, first=True) is Leaning.LONG
    assert leaning("What is the longest river of South America?", first=True, rules=ContextRules(10)) is Leaning.LONG


def test_a_step_of_an_agent_is_told_by_its_earlier_turns() -> None:
    called = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "content": "x"}
    question = {"role": "user", "content": "What is the capital of France?"}
    assert in_loop("chat", {"messages": [called, result, question]})
    assert not in_loop("chat", {"messages": [question]})
    assert in_loop("responses", {"input": [{"type": "function_call_output", "output": "x"}, question]})
    assert not in_loop("responses", {"input": "What?"})
    assert kept_exact("chat", {"messages": [called, result, question]}, question["content"]) is Leaning.LOOP
    assert kept_exact("chat", {"messages": [question]}, question["content"]) is None


def test_instructions_are_no_turn() -> None:
    asked = {"role": "user", "content": "Germany"}
    assert first_turn("chat", {"messages": [{"role": "system", "content": "s"}, asked]})
    assert not first_turn("chat", {"messages": [asked, {"role": "assistant", "content": "a"}, asked]})
    assert first_turn("responses", {"input": "Germany"})


# --- a real trace of agents -------------------------------------------------------------------------------------------


def sessions() -> dict[str, list[dict[str, Any]]]:
    """Calls by session, in order; skips where the trace is absent."""
    try:
        rows = list(read_rows(data_dir() / "traces" / "agent_miniswe.jsonl.gz"))
    except DataError as error:
        pytest.skip(str(error))
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["session_id"]].append(row)
    for calls in found.values():
        calls.sort(key=lambda call: call["_turn"])
    return found


def whole(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each step as one user message with everything so far: a client without turns."""
    for call in calls:
        yield {"model": "m", "messages": [{"role": "user", "content": call["input"]}]}


def turns(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each step as a conversation: what is new is the last user turn, the model's own answers stand between."""
    messages: list[dict[str, str]] = []
    before = ""
    for call in calls:
        text = call["input"]
        # Where a client has cut its history, the whole text is the new turn.
        new = text[len(before) :] if text.startswith(before) else text
        messages = [*messages, {"role": "user", "content": new}]
        yield {"model": "m", "messages": messages}
        messages = [*messages, {"role": "assistant", "content": call["output"]}]
        before = text


def last_only(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each step as a shared instruction and the newest result: a client that keeps its history elsewhere."""
    system = {"role": "system", "content": "You are a coding agent."}
    for body in turns(calls):
        yield {"model": "m", "messages": [system, body["messages"][-1]]}


def repeated(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each step ends in "continue": only what went before differs."""
    for body in turns(calls):
        yield {"model": "m", "messages": [*body["messages"], {"role": "user", "content": "continue"}]}


@pytest.mark.parametrize("form", [whole, turns, last_only, repeated])
def test_no_step_of_a_running_session_is_comparable_with_another(form: Any) -> None:
    origin = Origin("chat", "acme", "pool")
    steps = 0
    for calls in sessions().values():
        keys: set[bytes] = set()
        scopes: set[bytes] = set()
        contents: set[str] = set()
        for body in form(calls):
            fields = shaping_fields("chat", body)
            steps += 1
            # Equal bodies may share an answer: they are the same request, whatever step they are.
            if (content := repr(body)) in contents:
                continue
            contents.add(content)
            key = digest(origin, fields)
            assert key not in keys
            keys.add(key)
            asked = comparable("chat", fields)
            assert asked is not None
            if kept_exact("chat", fields, asked.text) is None:
                scope = asked.scope(origin, "minilm")
                assert scope not in scopes, asked.text[:200]
                scopes.add(scope)
    assert steps == 402
