"""Conversations and agents over real sockets, with a judge that would accept anything in the same scope."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from loadtest.data import DataError, data_dir, read_rows
from tests.fakes import ScriptedUpstream
from tests.gateway.harness import Answer, Client, comparing, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

Turn = dict[str, Any]
Turns = list[Turn]

EAGER: dict[str, Any] = {
    "categories": {"eager": {"threshold": 0.0}},
    "rules": [{"category": "eager", "when": {"model": "m"}}],
}
"""Every neighbour is accepted: only scope and context stand between two steps."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def eager(built: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    upstream, data = ScriptedUpstream(), tmp_path_factory.mktemp("data")
    async with upstream, serving(comparing(data, built, upstream, cache=EAGER)) as client:
        yield client


async def ask(client: Client, turns: Turns, namespace: str, **fields: Any) -> Answer:
    body = {"model": "m", "messages": turns, **fields}
    return await client.post("/v1/chat/completions", body, x_hitpath_namespace=namespace)


def said(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def outcome(answer: Answer) -> str:
    if "; hit;" in answer.cache:
        return answer.cache.rpartition("detail=")[2]
    return answer.cache.rpartition("detail=")[2] if "detail=" in answer.cache else "miss"


# --- a real trace of agents -------------------------------------------------------------------------------------------


def sessions() -> list[list[Turn]]:
    try:
        rows = list(read_rows(data_dir() / "traces" / "agent_miniswe.jsonl.gz"))
    except DataError as error:
        pytest.skip(str(error))
    found: dict[str, list[Turn]] = defaultdict(list)
    for row in rows:
        found[row["session_id"]].append(row)
    return [sorted(calls, key=lambda call: int(call["_turn"])) for calls in found.values()]


def whole(calls: list[Turn]) -> Iterator[Turns]:
    """Each step is one user message with everything so far."""
    for call in calls:
        yield [said("user", call["input"])]


def turns(calls: list[Turn]) -> Iterator[Turns]:
    """Each step adds a turn: what is new in the prompt, behind the model's own answer."""
    messages: Turns = []
    before = ""
    for call in calls:
        text = call["input"]
        messages = [*messages, said("user", text[len(before) :] if text.startswith(before) else text)]
        yield messages
        messages, before = [*messages, said("assistant", call["output"])], text


def last_only(calls: list[Turn]) -> Iterator[Turns]:
    """Each step is the same instruction and the newest result: the history is kept elsewhere."""
    for messages in turns(calls):
        yield [said("system", "You are a coding agent."), messages[-1]]


def repeated(calls: list[Turn]) -> Iterator[Turns]:
    """Each step ends in the same word."""
    for messages in turns(calls):
        yield [*messages, said("user", "continue")]


def tools(calls: list[Turn]) -> Iterator[Turns]:
    """Each step calls a tool, and the newest result is followed by a user's turn that is always alike."""
    messages: Turns = [said("user", calls[0]["input"])]
    for number, call in enumerate(calls):
        yield [*messages, said("user", "What is the next command that fixes the issue described above?")]
        function = {"name": "bash", "arguments": call["output"][:2000]}
        made = {"id": f"call_{number}", "type": "function", "function": function}
        result = {"role": "tool", "tool_call_id": made["id"], "content": call["input"][-500:]}
        messages = [*messages, {"role": "assistant", "content": None, "tool_calls": [made]}, result]


@pytest.mark.parametrize(("form", "count"), [(whole, 20), (turns, 20), (last_only, 20), (repeated, 8), (tools, 8)])
async def test_no_step_of_a_running_session_is_answered_with_another(eager: Client, form: Any, count: int) -> None:
    outcomes: dict[str, int] = defaultdict(int)
    chosen = sessions()[:count]
    for calls in chosen:
        for messages in form(calls):
            outcomes[outcome(await ask(eager, messages, f"agents-{form.__name__}"))] += 1
    assert sum(outcomes.values()) == sum(map(len, chosen))
    assert "semantic" not in outcomes, dict(outcomes)
    assert outcomes["agent-step"] + outcomes["leans-on-context"] + outcomes["text-too-long"] > 0


# --- turns that lean --------------------------------------------------------------------------------------------------

TALK = [said("user", "What is the capital of France?"), said("assistant", "Paris.")]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("and in Germany?", "and in Austria?"),
        ("How old is it?", "How old is he?"),
        ("continue", "go on"),
        ("the second one", "the first one"),
        ("Und in Frankreich?", "Und in Belgien?"),
        ("那德国呢？", "那法国呢？"),
    ],
)
async def test_a_turn_that_leans_on_its_context_is_kept_exact(eager: Client, text: str, other: str) -> None:
    first = await ask(eager, [*TALK, said("user", text)], "leaning")
    again = await ask(eager, [*TALK, said("user", text)], "leaning")
    near = await ask(eager, [*TALK, said("user", other)], "leaning")
    assert first.cache == "hitpath; fwd=miss; fwd-status=200; stored; detail=leans-on-context"
    assert "; hit;" in again.cache
    assert outcome(again) == "exact"
    assert outcome(near) == "leans-on-context"


async def test_what_leans_is_no_neighbour_of_what_stands_alone(eager: Client) -> None:
    await ask(eager, [*TALK, said("user", "and in Germany?")], "alone")
    full = await ask(eager, [*TALK, said("user", "What is the capital of Germany?")], "alone")
    assert full.cache == "hitpath; fwd=miss; fwd-status=200; stored"
    assert "x-hitpath-similarity" not in full.headers


async def test_what_leans_changes_as_soon_as_what_it_leans_on(eager: Client) -> None:
    turns = [said("user", "What is the weather in Paris?"), said("assistant", "Sunny."), said("user", "and in Rome?")]
    assert outcome(await ask(eager, turns, "weather")) == "volatile"
    assert outcome(await ask(eager, turns, "weather")) == "volatile"


async def test_a_question_about_now_takes_no_older_answer(eager: Client) -> None:
    await ask(eager, [said("user", "Who is the president of France?")], "now")
    answer = await ask(eager, [said("user", "Who is the president of France right now?")], "now")
    assert outcome(answer) == "volatile"


async def test_a_tools_result_in_a_users_turn_is_an_agents_step(eager: Client) -> None:
    system = said("system", "You are a coding agent.")
    result = "<returncode>0</returncode>\n<output>\n3 tests passed\n</output>"
    assert outcome(await ask(eager, [system, said("user", result)], "results")) == "agent-step"
    other = result.replace("3", "4")
    assert outcome(await ask(eager, [system, said("user", other)], "results")) == "agent-step"


async def test_a_category_can_still_be_off_for_a_turn_that_leans(eager: Client) -> None:
    body = {"model": "m", "messages": [*TALK, said("user", "and in Spain?")]}
    answer = await eager.post("/v1/chat/completions", body, x_hitpath_mode="exact")
    assert answer.cache == "hitpath; fwd=miss; fwd-status=200; stored"


# --- turns that stand alone -------------------------------------------------------------------------------------------


async def test_first_turns_still_hit(eager: Client) -> None:
    await ask(eager, [said("user", "How do I reset my password?")], "first")
    assert outcome(await ask(eager, [said("user", "How can I reset my password?")], "first")) == "semantic"


async def test_stateless_turns_with_a_long_shared_system_prompt_still_hit(eager: Client) -> None:
    system = said("system", "You answer questions about our products. " * 1000)
    await ask(eager, [system, said("user", "How do I reset my password?")], "stateless")
    again = await ask(eager, [system, said("user", "How can I reset my password?")], "stateless")
    assert outcome(again) == "semantic"


async def test_a_later_turn_that_stands_alone_hits_in_the_same_conversation_only(eager: Client) -> None:
    await ask(eager, [*TALK, said("user", "Which river flows through the city of Paris?")], "later")
    same = await ask(eager, [*TALK, said("user", "What river flows through the city of Paris?")], "later")
    assert outcome(same) == "semantic"
    other = [said("user", "What is the capital of Spain?"), said("assistant", "Madrid.")]
    elsewhere = await ask(eager, [*other, said("user", "What river flows through the city of Paris?")], "later")
    assert outcome(elsewhere) == "miss"


async def test_responses_are_looked_at_alike(eager: Client) -> None:
    for text, expected in (("and in Germany?", "leans-on-context"), ("What is the capital of Peru?", "miss")):
        body = {"model": "m", "input": [*TALK, said("user", text)]}
        answer = await eager.post("/v1/responses", body, x_hitpath_namespace="responses")
        assert outcome(answer) == expected
    called = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": "x"}
    body = {"model": "m", "input": [called, result, said("user", "What is the capital of Peru?")]}
    assert outcome(await eager.post("/v1/responses", body, x_hitpath_namespace="responses")) == "agent-step"
