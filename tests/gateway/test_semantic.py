"""Answers found by meaning, with the real local embedder; a remote one where the embedder has to misbehave.

Most tests let similarity alone decide, whose figures are known; those of the pair judge have a gateway of their own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway.app import open_gateway
from gateway.embedding import EmbedderError
from gateway.settings import Settings
from loadtest.scripted import answer_text
from tests.fakes import Hang, Normal, NotHttp, Script, ScriptedUpstream, error_reply, json_reply, refused_url
from tests.gateway.harness import ADMIN_KEY, Answer, Client, chat_body, serving, settings_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASKED = "What is the capital of France?"
SAME = "What's the capital of France?"
NEAR = "What is the capital city of France?"
OTHER = "What is the capital of Germany?"
FAR = "How long does it take to boil an egg?"
# Measured cosines to ASKED: SAME .992, NEAR .962, OTHER .664, FAR .173; the tests leave room around them.

CACHE: dict[str, Any] = {
    "embedder": {"kind": "local"},
    "judge": {"kind": "threshold"},
    "categories": {"careful": {"threshold": 0.98}, "literal": {"mode": "exact"}, "never": {"mode": "off"}},
    "rules": [
        {"category": name, "when": {"system_contains": f"be {name}"}} for name in ("careful", "literal", "never")
    ],
}


def local_settings(data_dir: Path, built: Path, upstream: ScriptedUpstream, **cache: Any) -> Settings:
    if not (data_dir / "cache").exists():
        (data_dir / "cache").symlink_to(built / "cache", target_is_directory=True)
    return settings_for(data_dir, upstream, cache={**CACHE, **cache})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Client, ScriptedUpstream]]:
    """One gateway for all; each test has a namespace of its own."""
    upstream, data_dir = ScriptedUpstream(), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HITPATH_ADMIN_KEY", ADMIN_KEY)
        async with upstream, serving(local_settings(data_dir, built, upstream)) as client:
            yield client, upstream


@dataclass(frozen=True)
class Semantic:
    """A gateway, seen from one namespace."""

    client: Client
    upstream: ScriptedUpstream
    namespace: str

    async def ask(
        self, text: str, *, stream: bool = False, fields: dict[str, Any] | None = None, **headers: str
    ) -> Answer:
        named = {"x_hitpath_namespace": self.namespace, **headers}
        return await self.client.chat(text, stream=stream, fields=fields, **named)

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        return await self.client.post(path, body, x_hitpath_namespace=self.namespace)


@pytest.fixture
def room(served: tuple[Client, ScriptedUpstream], request: pytest.FixtureRequest) -> Semantic:
    client, upstream = served
    upstream.exchanges.clear()
    return Semantic(client, upstream, request.node.name)


def similarity(answer: Answer) -> float:
    return float(answer.headers["x-hitpath-similarity"])


def threshold(answer: Answer) -> float:
    return float(answer.headers["x-hitpath-threshold"])


def is_semantic(answer: Answer) -> bool:
    return answer.cache.startswith("hitpath; hit; ") and answer.cache.endswith("; detail=semantic")


def is_plain_miss(answer: Answer) -> bool:
    return answer.cache == "hitpath; fwd=miss; fwd-status=200; stored"


# --- hits and misses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first_as_stream", [True, False])
async def test_the_same_question_in_other_words_is_a_hit(room: Semantic, stream: bool, first_as_stream: bool) -> None:
    first = await room.ask(ASKED, stream=first_as_stream)
    hit = await room.ask(SAME, stream=stream)
    assert is_plain_miss(first)
    assert is_semantic(hit)
    assert re.match(r"hitpath; hit; ttl=8\d{4}; detail=semantic$", hit.cache)
    assert similarity(hit) >= threshold(hit) == 0.9
    assert hit.headers["age"].isdigit()
    assert hit.text == first.text == answer_text("m", ASKED)
    assert hit.headers["content-type"].startswith("text/event-stream") is stream
    assert hit.headers["x-hitpath-upstream"] == "up0"
    assert hit.headers["x-hitpath-category"] == first.headers["x-hitpath-category"]
    for timed in ("exact", "embed", "search", "judge"):
        assert f"{timed};dur=" in hit.headers["server-timing"]
    entry = (await room.ask(ASKED)).headers["x-hitpath-entry"]
    assert hit.headers["x-hitpath-entry"] == entry
    assert len(room.upstream.exchanges) == 1


async def test_an_exact_hit_is_not_compared(room: Semantic) -> None:
    await room.ask(ASKED)
    hit = await room.ask(ASKED)
    assert "detail=exact" in hit.cache
    assert "x-hitpath-similarity" not in hit.headers
    assert "embed" not in hit.headers["server-timing"]


async def test_another_question_is_a_miss_and_says_how_near_it_came(room: Semantic) -> None:
    first = await room.ask(ASKED)
    assert "x-hitpath-similarity" not in first.headers
    near, far = await room.ask(OTHER), await room.ask(FAR)
    assert is_plain_miss(near)
    assert is_plain_miss(far)
    assert similarity(far) < similarity(near) < threshold(near) == 0.9
    assert near.text == answer_text("m", OTHER)


async def test_the_nearest_of_several_answers(room: Semantic) -> None:
    for text in (FAR, OTHER, ASKED):
        await room.ask(text)
    assert (await room.ask(SAME)).text == answer_text("m", ASKED)


async def test_a_hit_by_meaning_is_not_stored_again(room: Semantic) -> None:
    await room.ask(ASKED)
    assert [is_semantic(await room.ask(SAME)) for _ in range(2)] == [True, True]
    assert await purged(room, dry_run=True) == 1


async def test_responses_are_compared(room: Semantic) -> None:
    first = await room.post("/v1/responses", {"model": "m", "input": ASKED})
    turn = {"role": "user", "content": [{"type": "input_text", "text": ASKED}]}
    assert is_semantic(hit := await room.post("/v1/responses", {"model": "m", "input": SAME}))
    assert hit.json() == first.json()
    assert is_plain_miss(await room.post("/v1/responses", {"model": "m", "input": [turn]}))
    # The same words at another endpoint are another question.
    assert is_plain_miss(await room.ask(SAME))


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
async def test_what_is_not_a_question_is_never_compared(room: Semantic, path: str, field: str) -> None:
    for text in (ASKED, SAME):
        answer = await room.post(path, {"model": "m", field: text})
        assert is_plain_miss(answer)
        assert "x-hitpath-similarity" not in answer.headers


async def test_only_if_cached_is_content_with_a_hit_by_meaning(room: Semantic) -> None:
    await room.ask(ASKED)
    assert is_semantic(await room.ask(SAME, cache_control="only-if-cached"))
    refused = await room.ask(FAR, cache_control="only-if-cached")
    assert (refused.status, refused.json()["error"]["code"]) == (504, "not_cached")
    assert len(room.upstream.exchanges) == 1


async def test_controls_hold_for_hits_by_meaning_too(room: Semantic) -> None:
    await room.ask(ASKED)
    await asyncio.sleep(0.02)
    assert "hit" not in (await room.ask(SAME, cache_control="max-age=0")).cache.split("; ")
    assert "detail=refresh" in (await room.ask(SAME, cache_control="no-cache")).cache
    assert "detail=no-store" in (await room.ask(NEAR, cache_control="no-store")).cache
    assert len(room.upstream.exchanges) == 4


async def test_a_hit_by_meaning_expires(room: Semantic) -> None:
    await room.ask(ASKED, x_hitpath_ttl="30ms")
    await asyncio.sleep(0.1)
    answer = await room.ask(SAME)
    assert "fwd=miss" in answer.cache
    assert answer.text == answer_text("m", SAME)


async def purged(room: Semantic, **which: Any) -> int:
    key = {"authorization": f"Bearer {ADMIN_KEY}"}
    namespace = f"anonymous/{room.namespace}"
    answer = await room.client.post("/admin/purge", {"namespace": namespace, **which}, **key)
    return int(answer.json()["purged"])


@pytest.mark.parametrize("which", [{}, {"contains": "capital of france"}, {"model": "m"}])
async def test_a_purge_ends_hits_by_meaning_at_once(room: Semantic, which: dict[str, Any]) -> None:
    await room.ask(ASKED)
    assert is_semantic(await room.ask(SAME))
    assert await purged(room, **which) == 1
    answer = await room.ask(SAME)
    assert is_plain_miss(answer)
    assert "x-hitpath-similarity" not in answer.headers


# --- thresholds, modes, categories ---------------------------------------------------------------------------------


async def test_a_threshold_can_be_raised(room: Semantic) -> None:
    await room.ask(ASKED)
    refused = await room.ask(SAME, x_hitpath_threshold="0.9999")
    assert is_plain_miss(refused)
    assert 0.95 < similarity(refused) < threshold(refused) == 0.9999
    assert is_semantic(await room.ask(NEAR, x_hitpath_threshold="0.93"))


async def test_a_threshold_cannot_be_lowered(room: Semantic) -> None:
    await room.ask(ASKED)
    refused = await room.ask(OTHER, x_hitpath_threshold="0.1")
    assert is_plain_miss(refused)
    assert 0.1 < similarity(refused) < threshold(refused) == 0.9


@pytest.mark.parametrize(("mode", "told"), [("exact", "fwd=miss"), ("off", "detail=mode-off")])
async def test_a_mode_can_be_stricter(room: Semantic, mode: str, told: str) -> None:
    await room.ask(ASKED)
    answer = await room.ask(SAME, x_hitpath_mode=mode)
    assert told in answer.cache
    assert "x-hitpath-similarity" not in answer.headers
    assert is_semantic(await room.ask(NEAR))


async def test_a_mode_cannot_be_laxer(room: Semantic) -> None:
    await room.ask(ASKED)
    assert is_plain_miss(await room.ask(SAME, x_hitpath_category="math", x_hitpath_mode="semantic"))


async def test_what_was_asked_in_exact_mode_is_not_offered_by_meaning(room: Semantic) -> None:
    await room.ask(ASKED, x_hitpath_mode="exact")
    assert is_plain_miss(await room.ask(SAME))


@pytest.mark.parametrize(
    ("category", "floor", "near_hits"), [("general", 0.9, True), ("code", 0.92, True), ("careful", 0.98, False)]
)
async def test_the_header_names_the_category(room: Semantic, category: str, floor: float, near_hits: bool) -> None:
    await room.ask(ASKED)
    answer = await room.ask(NEAR, x_hitpath_category=category)
    assert is_semantic(answer) is near_hits
    assert threshold(answer) == floor
    assert near_hits or answer.headers["x-hitpath-category"] == category


def is_bypass(answer: Answer) -> bool:
    return answer.cache == "hitpath; fwd=bypass; fwd-status=200; detail=mode-off"


@pytest.mark.parametrize(
    ("name", "same", "near"),
    [
        ("careful", is_semantic, is_plain_miss),
        ("literal", is_plain_miss, is_plain_miss),
        ("never", is_bypass, is_bypass),
    ],
)
async def test_a_rule_names_the_category(
    room: Semantic, name: str, same: Callable[[Answer], bool], near: Callable[[Answer], bool]
) -> None:
    async def ask(text: str) -> Answer:
        system = {"role": "system", "content": f"You must BE {name}."}
        return await room.ask("", fields={"messages": [system, {"role": "user", "content": text}]})

    first = await ask(ASKED)
    assert first.headers.get("x-hitpath-category", name) == name
    assert same(await ask(SAME))
    assert near(answer := await ask(NEAR))
    assert answer.headers.get("x-hitpath-threshold") == ("0.98" if name == "careful" else None)


async def test_a_question_is_classified(room: Semantic) -> None:
    code = await room.ask("Write a Python function that merges two sorted lists.")
    medical = await room.ask("What are the symptoms of a heart attack?")
    assert (code.headers["x-hitpath-category"], medical.headers["x-hitpath-category"]) == ("code", "medical")


# --- the pair judge ------------------------------------------------------------------------------------------------

DOUBTED = "How do I enable the firewall on my laptop?"
OPPOSITE = "How do I disable the firewall on my laptop?"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served_by_pairs(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Client, ScriptedUpstream]]:
    """A gateway with the default judge."""
    upstream, data_dir = ScriptedUpstream(), tmp_path_factory.mktemp("pairs")
    async with upstream, serving(local_settings(data_dir, built, upstream, judge={})) as client:
        yield client, upstream


@pytest.fixture
def judged(served_by_pairs: tuple[Client, ScriptedUpstream], request: pytest.FixtureRequest) -> Semantic:
    return Semantic(*served_by_pairs, request.node.name)


async def test_the_pair_judge_serves_a_paraphrase(judged: Semantic) -> None:
    asked = "How do I reset my password?"
    await judged.ask(asked)
    hit = await judged.ask("How can I reset my password?", x_hitpath_category="general")
    assert is_semantic(hit)
    assert hit.text == answer_text("m", asked)
    assert float(hit.headers["x-hitpath-probability"]) > 0.8
    assert "judge;dur=" in hit.headers["server-timing"]


async def test_the_pair_judge_refuses_what_similarity_would_serve(judged: Semantic) -> None:
    await judged.ask(DOUBTED)
    refused = await judged.ask(OPPOSITE)
    assert refused.cache == "hitpath; fwd=miss; fwd-status=200; stored; detail=judge-refused"
    assert similarity(refused) > 0.85
    assert refused.text == answer_text("m", OPPOSITE)


async def test_nothing_is_judged_where_nothing_is_near(judged: Semantic) -> None:
    await judged.ask(ASKED)
    exact, far, alone = await judged.ask(ASKED), await judged.ask(FAR), await judged.ask(ASKED, stream=True)
    assert "judge" not in exact.headers["server-timing"]
    assert is_plain_miss(far)
    assert "detail=exact" in alone.cache


# --- where similarity may not speak --------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://pictures.example/1.png"}}


def turns(*before: dict[str, Any], content: Any = None) -> dict[str, Any]:
    """SAME as the last turn of a conversation."""
    return {"messages": [*before, {"role": "user", "content": content or SAME}]}


ELSEWHERE: dict[str, dict[str, Any]] = {
    "system prompt": turns({"role": "system", "content": "Answer like a pirate."}),
    "earlier turns": turns({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}),
    "a name": {"messages": [{"role": "user", "name": "bob", "content": SAME}]},
    "an image": turns(content=[{"type": "text", "text": SAME}, IMAGE]),
    "tools": {"tools": [TOOL]},
    "tool choice": {"tools": [TOOL], "tool_choice": "none"},
    "model": {"model": "n"},
    "response format": {"response_format": {"type": "json_object"}},
    "length": {"max_tokens": 500},
    "choices": {"n": 2},
    "log probabilities": {"logprobs": True},
    "stop": {"stop": ["\n"]},
    "greedy": {"temperature": 0},
    "creative": {"temperature": 1.5},
    "an unknown field": {"guided_choice": ["Paris"]},
}


@pytest.mark.parametrize("fields", ELSEWHERE.values(), ids=ELSEWHERE)
async def test_another_context_never_matches(room: Semantic, fields: dict[str, Any]) -> None:
    await room.ask(ASKED)
    elsewhere = await room.ask(SAME, fields=fields)
    assert is_plain_miss(elsewhere)
    assert "x-hitpath-similarity" not in elsewhere.headers
    # And it is not offered to those who ask without it.
    assert (await room.ask(NEAR)).text == answer_text("m", ASKED)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer another"},
        {"api_key": "another"},
        {"x_hitpath_namespace": "another"},
        {"openai_organization": "another"},
        {"openai_project": "another"},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_another_tenant_never_matches(room: Semantic, headers: Any) -> None:
    await room.ask(ASKED)
    elsewhere = await room.ask(SAME, **headers)
    assert is_plain_miss(elsewhere)
    assert "x-hitpath-similarity" not in elsewhere.headers


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9}, {"seed": 7}, {"user": "u1"}, {"stream_options": None}],
    ids=str,
)
async def test_what_does_not_change_the_meaning_still_matches(room: Semantic, fields: dict[str, Any]) -> None:
    await room.ask(ASKED)
    assert is_semantic(await room.ask(SAME, fields=fields))


async def test_a_conversation_matches_the_same_conversation(room: Semantic) -> None:
    before = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    await room.ask("", fields={"messages": [*before, {"role": "user", "content": ASKED}]})
    assert is_semantic(await room.ask("", fields=turns(*before)))
    before[1] = {"role": "assistant", "content": "Hello?"}
    assert is_plain_miss(await room.ask("", fields=turns(*before)))


async def test_a_tools_result_is_no_question(room: Semantic) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for said in (ASKED, SAME):
        before = [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [call]}]
        result = {"role": "tool", "tool_call_id": "c", "content": said}
        answer = await room.ask("", fields={"messages": [*before, result]})
        assert is_plain_miss(answer)
        assert "embed" not in answer.headers["server-timing"]


# --- texts that a vector cannot speak for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "alike"),
    [
        ("word " * 300 + "one", "word " * 300 + "two"),
        ("What is the capital of 🦄?", "What is the capital of 🐉?"),
    ],
    ids=["long", "unknown words"],
)
async def test_what_does_not_fit_the_window_stays_exact(room: Semantic, text: str, alike: str) -> None:
    for asked in (text, alike):
        answer = await room.ask(asked)
        assert answer.cache == "hitpath; fwd=miss; fwd-status=200; stored; detail=text-too-long"
        assert answer.text == answer_text("m", asked)
        assert "detail=exact" in (await room.ask(asked)).cache


@pytest.mark.parametrize("text", ["", " \n\t"], ids=["empty", "blank"])
async def test_no_text_is_not_compared(room: Semantic, text: str) -> None:
    for fields in ({}, {"user": "u"}):
        answer = await room.ask(text, fields=fields)
        assert "x-hitpath-similarity" not in answer.headers
        assert answer.status == 200
    assert len(room.upstream.exchanges) == 1


# --- many at once --------------------------------------------------------------------------------------------------

TOPICS = ("volcanoes", "penguins", "chess", "violins", "glaciers", "tax", "bread", "satellites", "poetry", "bicycles")
FORMS = (
    "What is the history of {}?",
    "How much do {} cost?",
    "Write a limerick about {}.",
    "Who knows most about {} in Italy?",
    "Why do children like {}?",
    "Name three films with {}.",
    "Are there any laws about {}?",
    "Translate '{}' into Finnish.",
    "Compare {} with elephants.",
    "What did Goethe say of {}?",
    "Draw {} with ASCII characters.",
    "Can one study {} at university?",
    "Which museum shows {}?",
    "Do {} make noise at night?",
    "Plan a birthday party on the theme of {}.",
    "How would you explain {} to a Roman soldier?",
    "Suggest a password that hides the word {}.",
    "What colour are {} under a microscope?",
    "List startups working on {}.",
    "Is there a patron saint of {}?",
)


async def test_many_different_questions_at_once(room: Semantic) -> None:
    questions = [form.format(topic) for form in FORMS for topic in TOPICS]
    assert len(questions) == 200
    answers = await asyncio.gather(*(room.ask(text, stream=number % 2 == 0) for number, text in enumerate(questions)))
    for text, answer in zip(questions, answers, strict=True):
        assert answer.status == 200
        assert is_semantic(answer) or answer.text == answer_text("m", text)
    assert sum(is_semantic(answer) for answer in answers) < 20
    again = await asyncio.gather(*(room.ask(text, cache_control="only-if-cached") for text in questions))
    assert {answer.status for answer in again} == {200}
    assert await room.client.gateway.store.check() == []


async def test_many_equal_questions_at_once_are_looked_up_once(room: Semantic) -> None:
    await room.ask(ASKED)
    answers = await asyncio.gather(*(room.ask(SAME, stream=number % 2 == 0) for number in range(50)))
    assert all(is_semantic(answer) and answer.text == answer_text("m", ASKED) for answer in answers)
    assert len(room.upstream.exchanges) == 1


# --- restarts ------------------------------------------------------------------------------------------------------


async def test_meaning_survives_a_restart(built: Path, tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        settings = local_settings(tmp_path, built, upstream)
        async with serving(settings) as client:
            first = await client.chat(ASKED)
        async with serving(settings) as client:
            hit = await client.chat(SAME)
            assert is_semantic(hit)
            assert hit.headers["x-hitpath-entry"] == first.headers["x-hitpath-entry"]
            assert hit.text == first.text
            assert is_plain_miss(await client.chat(FAR))
        assert len(upstream.exchanges) == 2


# --- a remote embedder ---------------------------------------------------------------------------------------------


def everything_is_one() -> Script:
    """An embedder to which all texts mean the same."""
    return json_reply({"data": [{"index": 0, "embedding": [0.6, 0.8, 0.0]}]})


@pytest_asyncio.fixture(loop_scope="module")
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest_asyncio.fixture(loop_scope="module")
async def embedder() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(default=everything_is_one()) as embedder:
        yield embedder


def remote_settings(
    data_dir: Path, embedder: ScriptedUpstream, upstream: ScriptedUpstream, model: str = "e", **more: Any
) -> Settings:
    remote = {"kind": "openai", "url": embedder.url, "model": model, "timeout": "500ms", **more}
    return settings_for(data_dir, upstream, cache={"embedder": remote, "judge": {"kind": "threshold"}})


async def test_a_remote_embedder(
    embedder: ScriptedUpstream, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBED_KEY", "secret")
    async with serving(remote_settings(tmp_path, embedder, upstream, api_key_env="EMBED_KEY")) as client:
        first = await client.chat(ASKED, authorization="Bearer client")
        hit = await client.chat(FAR, authorization="Bearer client")
    assert is_semantic(hit)
    assert similarity(hit) == 1.0
    assert hit.text == first.text
    # The classifier was trained on other vectors: what no rule names is general.
    assert hit.headers["x-hitpath-category"] == "general"
    assert [exchange.path for exchange in embedder.exchanges] == ["/v1/embeddings"] * 3
    assert [exchange.json()["input"] for exchange in embedder.exchanges[1:]] == [[ASKED], [FAR]]
    assert {exchange.headers["authorization"] for exchange in embedder.exchanges} == {"Bearer secret"}
    assert [exchange.headers["authorization"] for exchange in upstream.exchanges] == ["Bearer client"]


async def test_equal_questions_at_once_are_embedded_once(
    embedder: ScriptedUpstream, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(remote_settings(tmp_path, embedder, upstream)) as client:
        gate = asyncio.Event()
        upstream.script(Normal(gate=gate))
        asking = [asyncio.create_task(client.chat(ASKED, stream=number % 2 == 0)) for number in range(30)]
        await upstream.arrival()
        gate.set()
        assert {answer.text for answer in await asyncio.gather(*asking)} == {answer_text("m", ASKED)}
        assert len(embedder.exchanges) == 2  # the first asked for the dimension
        assert len(upstream.exchanges) == 1


FAILURES: dict[str, Script] = {
    "error": error_reply(500),
    "busy": error_reply(429),
    "refused text": error_reply(400),
    "hangs": Hang(),
    "not HTTP": NotHttp(),
    "not JSON": json_reply(b"<html>"),
    "no vector": json_reply({"data": []}),
    "other dimension": json_reply({"data": [{"index": 0, "embedding": [1.0, 0.0]}]}),
    "zero vector": json_reply({"data": [{"index": 0, "embedding": [0.0, 0.0, 0.0]}]}),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_an_embedder_that_fails_is_a_miss(
    embedder: ScriptedUpstream, upstream: ScriptedUpstream, tmp_path: Path, failure: Script
) -> None:
    async with serving(remote_settings(tmp_path, embedder, upstream)) as client:
        await client.chat(ASKED)
        embedder.default = failure
        missed, streamed = await client.chat(SAME), await client.chat(NEAR, stream=True)
        for answer, text in ((missed, SAME), (streamed, NEAR)):
            assert answer.cache == "hitpath; fwd=miss; fwd-status=200; stored; detail=embedder-failed"
            assert answer.text == answer_text("m", text)
        assert "detail=exact" in (await client.chat(SAME)).cache
        embedder.default = everything_is_one()
        assert is_semantic(hit := await client.chat(FAR))
        # What was stored without a vector is found exactly only.
        assert hit.text == answer_text("m", ASKED)


async def test_an_embedder_that_is_not_there_stops_the_start(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    remote = {"kind": "openai", "url": refused_url(), "model": "e"}
    with pytest.raises(EmbedderError, match="/v1/embeddings"):
        async with open_gateway(settings_for(tmp_path, upstream, cache={"embedder": remote})):
            pass


async def test_vectors_of_two_embedders_never_meet(
    embedder: ScriptedUpstream, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(remote_settings(tmp_path, embedder, upstream, "old")) as client:
        first = await client.chat(ASKED)
    async with serving(remote_settings(tmp_path, embedder, upstream, "new")) as client:
        answer = await client.chat(FAR)
        assert is_plain_miss(answer)
        assert "x-hitpath-similarity" not in answer.headers
        # By its words it is still found.
        assert (await client.chat(ASKED)).body == first.body
        assert is_semantic(await client.chat(OTHER))


async def test_without_an_embedder_nothing_is_compared(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, upstream)) as client:
        await client.chat(ASKED)
        answer = await client.chat(SAME)
        assert is_plain_miss(answer)
        assert "x-hitpath-similarity" not in answer.headers


async def test_where_no_category_compares_no_embedder_is_opened(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    cache = {"embedder": {"kind": "openai", "url": refused_url(), "model": "e"}, "default": {"mode": "exact"}}
    async with serving(settings_for(tmp_path, upstream, cache=cache)) as client:
        assert (await client.post("/v1/chat/completions", chat_body(ASKED))).status == 200
