"""How long answers live by category, over real sockets: freshness, stale answers, admission, pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai import AsyncOpenAI

from gateway.settings import SettingsError
from tests.fakes import Hang, Normal, ScriptedUpstream, error_reply
from tests.gateway.harness import Answer, Client, chat_body, serving, settings_for

CATEGORIES: dict[str, Any] = {
    "brief": {"ttl": "40ms", "stale_while_revalidate": "10m", "stale_if_error": "30m"},
    "robust": {"ttl": "40ms", "stale_if_error": "30m"},
    "rare": {"admit_after": 3},
    "slow": {"replay_pace": "2000/s"},
    "slowest": {"replay_pace": "1/s"},
    "even": {"ttl": "1000s", "ttl_jitter": 0},
    "spread": {"ttl": "1000s", "ttl_jitter": "50%"},
    "live": {"freshness": {"now": "5s", "day": "1m"}},
}


@pytest.fixture
async def client(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(settings_for(tmp_path, upstream, cache={"categories": CATEGORIES})) as client:
        yield client


def ttl(answer: Answer) -> int:
    return int(answer.cache.partition("ttl=")[2].partition(";")[0])


async def metric(client: Client, name: str) -> float:
    text = (await client.ask("GET", "/metrics")).body.decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


# --- lifetimes --------------------------------------------------------------------------------------------------------


async def test_jitter_shortens_and_never_lengthens(client: Client) -> None:
    lives: dict[str, list[int]] = {"even": [], "spread": []}
    for category, seen in lives.items():
        for number in range(12):
            for _ in range(2):
                answer = await client.chat(f"{category} {number}", x_hitpath_category=category)
            seen.append(ttl(answer))
    assert min(lives["even"]) >= 998
    assert all(500 - 2 <= life <= 1000 for life in lives["spread"])
    assert max(lives["spread"]) - min(lives["spread"]) > 50


async def test_a_ttl_that_the_client_names_is_not_jittered(client: Client) -> None:
    for _ in range(2):
        answer = await client.chat("hello", x_hitpath_category="spread", x_hitpath_ttl="300s")
    assert ttl(answer) >= 298


@pytest.mark.parametrize(
    "text", ["What is the price of gold?", "What's the score of the Lakers game?", "What is the latest version of Go?"]
)
async def test_what_changes_at_once_is_not_kept(client: Client, text: str) -> None:
    for _ in range(2):
        answer = await client.chat(text)
        assert answer.cache == "hitpath; fwd=miss; fwd-status=200; detail=volatile"
    assert await metric(client, 'hitpath_not_stored_total{reason="volatile"}') == 2


async def test_what_changes_within_the_day_lives_shorter(client: Client) -> None:
    for _ in range(2):
        answer = await client.chat("Which shops are open today?")
    assert 870 <= ttl(answer) <= 900
    for _ in range(2):
        answer = await client.chat("Which pubs are open today?", x_hitpath_category="live")
    assert ttl(answer) <= 60
    for _ in range(2):
        answer = await client.chat("What is the price of gold?", x_hitpath_category="live")
    assert "; hit;" in answer.cache
    assert ttl(answer) <= 5


async def test_vectors_never_change(client: Client) -> None:
    for _ in range(2):
        answer = await client.post("/v1/embeddings", {"model": "m", "input": "the price of gold right now"})
    assert "; hit;" in answer.cache


# --- stale answers ----------------------------------------------------------------------------------------------------


async def expired(client: Client, text: str, category: str, **fields: Any) -> Answer:
    first = await client.chat(text, x_hitpath_category=category, **fields)
    await asyncio.sleep(0.06)
    return first


async def test_a_stale_answer_is_served_at_once_and_fetched_anew_once(
    client: Client, upstream: ScriptedUpstream
) -> None:
    first = await expired(client, "hello", "brief")
    gate = asyncio.Event()
    upstream.script(Normal(gate=gate))
    for _ in range(5):
        stale = await client.chat("hello", x_hitpath_category="brief")
        assert stale.cache.startswith("hitpath; hit; ttl=")
        assert stale.cache.endswith("; detail=stale-while-revalidate")
        assert ttl(stale) <= 0
        assert stale.body == first.body
    await upstream.arrival(2)
    assert len(upstream.exchanges) == 2
    assert await metric(client, 'hitpath_refreshes_total{outcome="started"}') == 1
    assert await metric(client, 'hitpath_refreshes_total{outcome="declined"}') == 4
    stored = client.gateway.store.stats().stored
    gate.set()
    await until(lambda: client.gateway.store.stats().stored == stored + 1)
    again = await client.chat("hello", x_hitpath_category="brief")
    assert again.headers["x-hitpath-entry"] != first.headers["x-hitpath-entry"]


async def test_a_stream_is_refreshed_too(client: Client, upstream: ScriptedUpstream) -> None:
    first = await expired(client, "hello", "brief", stream=True)
    stale = await client.chat("hello", stream=True, x_hitpath_category="brief")
    assert stale.cache.endswith("detail=stale-while-revalidate")
    assert stale.text == first.text
    await until(lambda: client.gateway.store.stats().stored == 2)
    assert upstream.exchanges[1].json()["stream"] is True


@pytest.mark.parametrize("directive", ["no-cache", "max-age=60"])
async def test_who_wants_it_fresh_waits(client: Client, upstream: ScriptedUpstream, directive: str) -> None:
    await expired(client, "hello", "brief")
    fresh = await client.chat("hello", x_hitpath_category="brief", cache_control=directive)
    assert "fwd=" in fresh.cache
    assert len(upstream.exchanges) == 2


async def test_only_if_cached_takes_the_stale_one_and_asks_nobody(client: Client, upstream: ScriptedUpstream) -> None:
    await expired(client, "hello", "brief")
    answer = await client.chat("hello", x_hitpath_category="brief", cache_control="only-if-cached")
    assert answer.cache.endswith("detail=stale-while-revalidate")
    assert await metric(client, "hitpath_refreshes_total") == 0
    assert len(upstream.exchanges) == 1


async def test_what_changes_within_the_day_is_never_served_late(client: Client, upstream: ScriptedUpstream) -> None:
    await expired(client, "Which shops are open today?", "brief")
    answer = await client.chat("Which shops are open today?", x_hitpath_category="brief")
    assert answer.cache == "hitpath; fwd=stale; fwd-status=200; stored; detail=stale"


async def test_a_refresh_that_fails_leaves_the_stale_answer(client: Client, upstream: ScriptedUpstream) -> None:
    first = await expired(client, "hello", "brief")
    upstream.script(error_reply(500), error_reply(500))
    for number in (2, 3):
        stale = await client.chat("hello", x_hitpath_category="brief")
        assert stale.body == first.body
        await (await upstream.arrival(number)).finished.wait()
        await until(lambda: client.gateway.store.stats().stored == 1)
    await upstream.stop()
    assert (await client.chat("hello", x_hitpath_category="brief")).body == first.body
    await upstream.start()


async def test_a_refresh_under_way_does_not_hold_up_the_end(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, upstream, cache={"categories": CATEGORIES})) as client:
        await expired(client, "hello", "brief")
        upstream.script(Hang())
        await client.chat("hello", x_hitpath_category="brief")
        exchange = await upstream.arrival(2)
    await exchange.disconnected.wait()


@pytest.mark.parametrize("failing", [error_reply(500), error_reply(503), None])
async def test_a_stale_answer_stands_in_for_a_failing_backend(
    client: Client, upstream: ScriptedUpstream, failing: Any
) -> None:
    first = await expired(client, "hello", "robust")
    if failing is None:
        await upstream.stop()
    else:
        upstream.script(failing)
    stale = await client.chat("hello", x_hitpath_category="robust")
    assert stale.status == 200
    assert stale.body == first.body
    assert stale.cache.endswith("; detail=stale-if-error")
    if failing is None:
        await upstream.start()


async def test_an_error_of_the_clients_own_is_told(client: Client, upstream: ScriptedUpstream) -> None:
    await expired(client, "hello", "robust")
    upstream.script(error_reply(400))
    assert (await client.chat("hello", x_hitpath_category="robust")).status == 400


def test_a_stale_answer_cannot_be_promised_for_longer_than_it_is_kept(tmp_path: Path) -> None:
    for key in ("stale_while_revalidate", "stale_if_error"):
        cache = {"stale_grace": "1m", "categories": {"code": {key: "2m"}}}
        with pytest.raises(SettingsError, match=rf"cache.categories.code.{key}: is longer than cache.stale_grace"):
            settings_for(tmp_path, "http://127.0.0.1:1/v1", cache=cache)


# --- admission --------------------------------------------------------------------------------------------------------


async def test_an_answer_is_kept_at_the_third_miss(client: Client, upstream: ScriptedUpstream) -> None:
    seen = [(await client.chat("hello", x_hitpath_category="rare")).cache for _ in range(4)]
    assert seen[:2] == ["hitpath; fwd=miss; fwd-status=200; detail=too-seldom"] * 2
    assert seen[2] == "hitpath; fwd=miss; fwd-status=200; stored"
    assert "; hit;" in seen[3]
    assert len(upstream.exchanges) == 3
    assert "detail=too-seldom" in (await client.chat("another", x_hitpath_category="rare", stream=True)).cache


# --- pace -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_a_replay_at_a_pace_says_the_same_in_small_events(client: Client, path: str) -> None:
    question = {"chat/completions": "messages", "completions": "prompt", "responses": "input"}[path[4:]]
    asked: Any = [{"role": "user", "content": "hello"}] if question == "messages" else "hello"
    body = {"model": "m", question: asked, "max_tokens": 900}
    await client.post(path, body, x_hitpath_category="slow")
    at_once = await client.post(path, {**body, "stream": True}, x_hitpath_category="even")
    paced = await client.post(path, {**body, "stream": True}, x_hitpath_category="slow")
    whole = await client.post(path, body, x_hitpath_category="slow")
    assert "; hit;" in paced.cache
    assert "; hit;" in whole.cache
    assert paced.headers["content-type"].startswith("text/event-stream")
    assert texts(paced) == texts(at_once) != ""
    numbers = [event["sequence_number"] for event in paced.events() if "sequence_number" in event]
    assert numbers == list(range(len(numbers)))


def texts(answer: Answer) -> str:
    return "".join(said for event in answer.events() for said in said_by(event))


def said_by(event: Any) -> list[str]:
    if str(event.get("type", "")).endswith("output_text.delta"):
        return [event["delta"]]
    return [item.get("text") or item.get("delta", {}).get("content") or "" for item in event.get("choices", ())]


async def test_a_slow_replay_comes_in_pieces_and_ends_when_the_client_goes(client: Client) -> None:
    await client.chat("hello", x_hitpath_category="slowest")
    body = orjson.dumps(chat_body("hello", stream=True))
    headers = {"x-hitpath-category": "slowest", "content-type": "application/json"}
    asked = client.session.post(f"{client.url}/v1/chat/completions", data=body, headers=headers)
    async with asked as response:
        assert "detail=exact" in response.headers["cache-status"]
        first = await response.content.readany()
        assert first.startswith(b"data: ")
        assert b"[DONE]" not in first
        response.close()
    while await metric(client, "hitpath_client_disconnects_total") == 0:
        await asyncio.sleep(0.02)


async def test_the_official_client_reads_a_replay_at_a_pace(client: Client) -> None:
    async with AsyncOpenAI(base_url=f"{client.url}/v1", api_key="k", max_retries=0) as official:
        asked: Any = [{"role": "user", "content": "hello"}]
        headers = {"x-hitpath-category": "slow"}
        whole = await official.chat.completions.create(model="m", messages=asked, extra_headers=headers)
        stream = await official.chat.completions.create(
            model="m", messages=asked, stream=True, stream_options={"include_usage": True}, extra_headers=headers
        )
        assert "detail=exact" in stream.response.headers["cache-status"]
        chunks = [chunk async for chunk in stream]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


async def test_a_pace_is_for_streams_only(client: Client) -> None:
    first = await client.chat("hello", x_hitpath_category="slowest")
    hit = await client.chat("hello", x_hitpath_category="slowest")
    assert hit.body == first.body
