"""The cached paths: hits, misses, controls, forms, single flight, over real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from tests.fakes import Hang, Normal, Reply, ScriptedUpstream, error_reply, json_reply, refused_url, stream_reply
from tests.gateway.harness import Client, chat_body, serving, settings_for

JSON = {"content-type": "application/json"}


def chunk(content: str | None = None, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **fields}


async def test_the_second_of_two_equal_questions_is_a_hit(client: Client, upstream: ScriptedUpstream) -> None:
    first, second = await client.chat("hello"), await client.chat("hello")
    assert first.cache == "hitpath; fwd=miss; fwd-status=200; stored"
    assert second.cache.startswith("hitpath; hit; ttl=8")
    assert second.cache.endswith("; detail=exact")
    assert first.body == second.body
    assert second.headers["age"] == "0"
    assert second.headers["x-hitpath-entry"] == first.headers["x-hitpath-entry"]
    assert second.headers["x-hitpath-upstream"] == "up0"
    assert second.headers["x-hitpath-category"] == "general"
    assert "exact;dur=" in second.headers["server-timing"]
    assert len(upstream.exchanges) == 1


async def test_another_question_is_a_miss(client: Client) -> None:
    await client.chat("hello")
    assert "fwd=miss" in (await client.chat("hello!")).cache


async def test_the_backend_gets_the_clients_own_bytes(client: Client, upstream: ScriptedUpstream) -> None:
    raw = b'{"messages" : [{"content":"h\\u0065llo","role":"user"}],  "model":"m", "temperature": 1.0}'
    await client.post("/v1/chat/completions?x=1", raw, authorization="Bearer k", x_own="1", x_hitpath_ttl="5m")
    sent = upstream.exchanges[0]
    assert sent.body == raw
    assert sent.path == "/v1/chat/completions?x=1"
    assert sent.headers["authorization"] == "Bearer k"
    assert sent.headers["x-own"] == "1"
    assert "x-hitpath-ttl" not in sent.headers
    assert sent.headers["x-request-id"]


@pytest.mark.parametrize("stream", [True, False])
async def test_what_an_engine_says_of_its_keys_and_values_reaches_who_waited_for_it(
    client: Client, upstream: ScriptedUpstream, stream: bool
) -> None:
    used = {"x-hitpath-kv": "prefix=16; chunks=2; recomputed=9; tier=disk"}
    script = stream_reply(chunk("one"), chunk(finish="stop")) if stream else json_reply(completion("one"))
    upstream.script(replace(script, headers={**script.headers, **used}))
    first, hit = await client.chat("hello", stream=stream), await client.chat("hello", stream=stream)
    assert first.headers["x-hitpath-kv"] == used["x-hitpath-kv"]
    assert "x-hitpath-kv" not in hit.headers
    assert "; hit;" in hit.cache
    exact = await client.chat("hello", stream=stream, x_hitpath_kv="exact")
    assert "fwd=miss" in exact.cache  # the stored answer may not have been computed so
    assert upstream.exchanges[-1].headers["x-hitpath-kv"] == "exact"


@pytest.mark.parametrize("first_as_stream", [True, False])
async def test_one_answer_serves_both_forms(client: Client, upstream: ScriptedUpstream, first_as_stream: bool) -> None:
    one = await client.chat("hello", stream=first_as_stream)
    other = await client.chat("hello", stream=not first_as_stream)
    again = await client.chat("hello", stream=first_as_stream)
    assert one.text == other.text == again.text != ""
    assert "detail=exact" in other.cache
    assert "detail=exact" in again.cache
    assert len(upstream.exchanges) == 1
    stream = one if first_as_stream else other
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert stream.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("asked", [True, False])
async def test_usage_is_in_a_stream_only_if_asked_for_and_always_known(client: Client, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    missed = await client.chat("hello", stream=True, fields=options)
    hit = await client.chat("hello", stream=True, fields=options)
    for answer in (missed, hit):
        usages = [event["usage"] for event in answer.events() if event.get("usage")]
        assert len(usages) == (1 if asked else 0)
        assert all(event["choices"] for event in answer.events() if not event.get("usage"))
    whole = await client.chat("hello")
    assert whole.json()["usage"]["total_tokens"] > 0


async def test_every_cached_endpoint_hits(client: Client, upstream: ScriptedUpstream) -> None:
    bodies = {
        "/v1/completions": {"model": "m", "prompt": "once"},
        "/v1/embeddings": {"model": "m", "input": ["a", "b"]},
        "/v1/responses": {"model": "m", "input": "hello"},
    }
    for path, body in bodies.items():
        missed, hit = await client.post(path, body), await client.post(path, body)
        assert "fwd=miss" in missed.cache
        assert "detail=exact" in hit.cache, path
        assert hit.json() == missed.json()
    assert len(upstream.exchanges) == 3


async def test_a_responses_stream_and_its_whole_are_one(client: Client, upstream: ScriptedUpstream) -> None:
    streamed = await client.post("/v1/responses", {"model": "m", "input": "hello", "stream": True})
    whole = await client.post("/v1/responses", {"model": "m", "input": "hello"})
    replayed = await client.post("/v1/responses", {"model": "m", "input": "hello", "stream": True})
    assert streamed.events()[-1]["type"] == replayed.events()[-1]["type"] == "response.completed"
    assert streamed.events()[-1]["response"] == whole.json() == replayed.events()[-1]["response"]
    assert len(upstream.exchanges) == 1


async def test_calls_that_lean_on_the_backends_memory_are_passed_through(client: Client) -> None:
    body = {"model": "m", "input": "and then?", "previous_response_id": "resp_1"}
    for _ in range(2):
        answer = await client.post("/v1/responses", body)
        assert answer.cache == "hitpath; fwd=bypass; fwd-status=200; detail=stateful"


# --- controls ------------------------------------------------------------------------------------------------------


async def test_no_cache_fetches_anew_and_stores(client: Client, upstream: ScriptedUpstream) -> None:
    await client.chat("hello")
    upstream.script(Normal(tokens=3))
    fresh = await client.chat("hello", cache_control="no-cache")
    assert fresh.cache == "hitpath; fwd=request; fwd-status=200; stored; detail=refresh"
    assert (await client.chat("hello")).body == fresh.body


async def test_no_store_neither_reads_nor_stores(client: Client, upstream: ScriptedUpstream) -> None:
    for _ in range(2):
        answer = await client.chat("hello", cache_control="no-store")
        assert answer.cache == "hitpath; fwd=bypass; fwd-status=200; detail=no-store"
    assert "fwd=miss" in (await client.chat("hello")).cache
    assert len(upstream.exchanges) == 3


async def test_max_age_refuses_older_answers(client: Client) -> None:
    await client.chat("hello")
    await asyncio.sleep(0.02)
    assert "fwd=request" in (await client.chat("hello", cache_control="max-age=0")).cache
    assert "detail=exact" in (await client.chat("hello", cache_control="max-age=600")).cache


async def test_only_if_cached_never_generates(client: Client, upstream: ScriptedUpstream) -> None:
    refused = await client.chat("hello", cache_control="only-if-cached")
    assert (refused.status, refused.json()["error"]["code"]) == (504, "not_cached")
    assert upstream.exchanges == []
    await client.chat("hello")
    assert "detail=exact" in (await client.chat("hello", cache_control="only-if-cached")).cache


async def test_stale_if_error_serves_what_has_expired_only_when_the_backend_fails(
    client: Client, upstream: ScriptedUpstream
) -> None:
    first = await client.chat("hello", x_hitpath_ttl="100ms")
    await asyncio.sleep(0.15)
    upstream.script(error_reply(503))
    stale = await client.chat("hello", cache_control="stale-if-error=60")
    assert stale.body == first.body
    assert "detail=stale-if-error" in stale.cache
    upstream.script(error_reply(503))
    assert (await client.chat("hello")).status == 503
    upstream.script(error_reply(503))
    await asyncio.sleep(1)
    assert (await client.chat("hello", cache_control="stale-if-error=0")).status == 503
    assert "fwd=stale" in (await client.chat("hello", cache_control="stale-if-error=60")).cache


async def test_mode_off_bypasses(client: Client) -> None:
    for _ in range(2):
        assert "fwd=bypass; fwd-status=200; detail=mode-off" in (await client.chat("hi", x_hitpath_mode="off")).cache


async def test_a_ttl_of_zero_is_not_stored(client: Client) -> None:
    answer = await client.chat("hi", x_hitpath_ttl="0")
    assert answer.cache == "hitpath; fwd=miss; fwd-status=200; detail=zero-ttl"


async def test_a_namespace_is_a_cache_of_its_own(client: Client) -> None:
    await client.chat("hello", x_hitpath_namespace="a")
    assert "fwd=miss" in (await client.chat("hello", x_hitpath_namespace="b")).cache
    assert "fwd=miss" in (await client.chat("hello")).cache
    assert "hit" in (await client.chat("hello", x_hitpath_namespace="a")).cache


async def test_clients_with_other_tokens_never_share(client: Client) -> None:
    await client.chat("hello", authorization="Bearer one")
    assert "fwd=miss" in (await client.chat("hello", authorization="Bearer two")).cache
    assert "fwd=miss" in (await client.chat("hello", api_key="one-more")).cache
    assert "; hit;" in (await client.chat("hello", authorization="Bearer one")).cache


async def test_the_category_header_decides(client: Client) -> None:
    answer = await client.chat("hello", x_hitpath_category="finance")
    assert answer.headers["x-hitpath-category"] == "finance"
    hit = await client.chat("hello", x_hitpath_category="finance")
    assert "ttl=35" in hit.cache or "ttl=3600" in hit.cache
    assert hit.headers["x-hitpath-category"] == "finance"


async def test_request_ids_go_through(client: Client) -> None:
    assert (await client.chat("hello", x_request_id="mine")).headers["x-request-id"] == "mine"
    assert (await client.chat("hello")).headers["x-request-id"].startswith("req_")


# --- what is not stored --------------------------------------------------------------------------------------------


def completion(content: str | None = "hi", finish: str | None = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion(finish="length"), "truncated"),
        (completion(finish="content_filter"), "filtered"),
        (completion(content=None), "empty"),
        (completion(content=""), "empty"),
        (completion(finish=None), "malformed"),
        ({"choices": []}, "empty"),
        ({"answer": 42}, "malformed"),
        (["not", "an", "object"], "malformed"),
        ({"error": {"message": "sorry"}}, "error-status"),
    ],
)
async def test_what_is_not_whole_passes_but_is_not_stored(
    client: Client, upstream: ScriptedUpstream, answer: Any, reason: str
) -> None:
    upstream.script(json_reply(answer), json_reply(answer))
    for _ in range(2):
        got = await client.chat("hello")
        assert got.json() == answer
        assert got.cache == f"hitpath; fwd=miss; fwd-status=200; detail={reason}"


async def test_a_backends_error_passes_unchanged_and_is_not_stored(client: Client, upstream: ScriptedUpstream) -> None:
    upstream.script(error_reply(429, "slow down", retry_after="7"))
    refused = await client.chat("hello")
    assert refused.status == 429
    assert refused.headers["retry-after"] == "7"
    assert refused.json()["error"]["message"] == "slow down"
    assert refused.cache == "hitpath; fwd=miss; fwd-status=429; detail=error-status"
    assert (await client.chat("hello")).status == 200


async def test_a_truncated_stream_passes_but_is_not_stored(client: Client, upstream: ScriptedUpstream) -> None:
    upstream.script(stream_reply(chunk("hi"), chunk(finish="length")))
    assert (await client.chat("hello", stream=True)).text == "hi"
    assert "fwd=miss" in (await client.chat("hello")).cache


# --- single flight -------------------------------------------------------------------------------------------------


async def test_equal_questions_at_one_time_are_generated_once(client: Client, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.script(Normal(gate=gate))
    asking = [asyncio.create_task(client.chat("hello", stream=number % 2 == 1)) for number in range(8)]
    await upstream.arrival()
    await asyncio.sleep(0.05)
    gate.set()
    answers = await asyncio.gather(*asking)
    assert len({answer.text for answer in answers}) == 1
    assert sum("collapsed" in answer.cache for answer in answers) == 7
    assert len(upstream.exchanges) == 1


async def test_followers_stream_from_the_first_byte(client: Client, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.script(stream_reply(chunk("one"), gate, chunk("two"), chunk(finish="stop")))
    body = orjson.dumps(chat_body("hello", stream=True))
    async with (
        client.session.post(f"{client.url}/v1/chat/completions", data=body) as leader,
        client.session.post(f"{client.url}/v1/chat/completions", data=body) as follower,
    ):
        assert b"one" in await leader.content.readany()
        assert b"one" in await follower.content.readany()
        assert "collapsed" in follower.headers["cache-status"]
        gate.set()
        assert await leader.read() == await follower.read()
    assert len(upstream.exchanges) == 1


async def test_a_streaming_follower_of_a_whole_answer_gets_events_even_if_it_is_truncated(
    client: Client, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.script(Reply((orjson.dumps(completion(finish="length")),), 200, JSON, gate=gate))
    leader = asyncio.create_task(client.chat("hello"))
    await upstream.arrival()
    follower = asyncio.create_task(client.chat("hello", stream=True))
    await asyncio.sleep(0.05)
    gate.set()
    assert (await leader).json()["choices"][0]["finish_reason"] == "length"
    events = (await follower).events()
    assert [choice["finish_reason"] for event in events for choice in event["choices"]][-1] == "length"


async def test_a_leader_that_hangs_up_does_not_cut_off_its_followers(
    client: Client, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.script(stream_reply(chunk("one"), gate, chunk("two"), chunk(finish="stop")))
    body = orjson.dumps(chat_body("hello", stream=True))
    leader = await client.session.post(f"{client.url}/v1/chat/completions", data=body)
    await leader.content.readany()
    follower = asyncio.create_task(client.chat("hello"))
    await asyncio.sleep(0.05)
    leader.close()
    await asyncio.sleep(0.05)
    gate.set()
    assert (await follower).text == "onetwo"
    assert "hit" in (await client.chat("hello")).cache


@pytest.mark.parametrize("stream", [True, False])
async def test_when_everybody_hangs_up_the_backend_call_is_cancelled(
    client: Client, upstream: ScriptedUpstream, stream: bool
) -> None:
    upstream.script(Hang() if not stream else stream_reply(chunk("one"), asyncio.Event(), chunk("two")))
    asking = [asyncio.create_task(client.chat("hello", stream=stream)) for _ in range(3)]
    exchange = await upstream.arrival()
    await asyncio.sleep(0.05)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await asyncio.wait_for(exchange.disconnected.wait(), 5)
    assert "fwd=miss" in (await client.chat("hello")).cache


async def test_a_refresh_does_not_join_an_older_generation(client: Client, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.script(Normal(gate=gate))
    older = asyncio.create_task(client.chat("hello"))
    await upstream.arrival()
    assert "collapsed" not in (await client.chat("hello", cache_control="no-cache")).cache
    gate.set()
    await older
    assert len(upstream.exchanges) == 2


# --- several backends ----------------------------------------------------------------------------------------------


async def test_a_backend_that_refuses_is_passed_over(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, refused_url(), upstream)) as client:
        for number in range(3):
            answer = await client.chat(f"hello {number}")
            assert (answer.status, answer.headers["x-hitpath-upstream"]) == (200, "up1")


async def test_models_are_routed_to_who_serves_them(tmp_path: Path) -> None:
    async with ScriptedUpstream() as small, ScriptedUpstream() as large:
        upstreams = [
            {"name": "small", "kind": "vllm", "url": small.url, "models": ["small-*"]},
            {"name": "large", "kind": "sglang", "url": large.url, "models": ["large"]},
        ]
        async with serving(settings_for(tmp_path, upstreams=upstreams)) as client:
            assert (await client.chat("q", fields={"model": "small-1"})).headers["x-hitpath-upstream"] == "small"
            assert (await client.chat("q", fields={"model": "large"})).headers["x-hitpath-upstream"] == "large"
            unknown = await client.chat("q", fields={"model": "huge"})
            assert (unknown.status, unknown.json()["error"]["code"]) == (404, "model_not_found")
            assert "large, small-*" in unknown.json()["error"]["message"]


async def test_answers_survive_a_restart(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, upstream)
    async with serving(settings) as client:
        first = await client.chat("hello", stream=True)
    async with serving(settings) as client:
        again = await client.chat("hello")
    assert again.text == first.text
    assert "detail=exact" in again.cache
    assert len(upstream.exchanges) == 1


async def test_a_pipeline_of_many_connections(client: Client, upstream: ScriptedUpstream) -> None:
    answers = await asyncio.gather(*(client.chat(f"question {number % 20}") for number in range(200)))
    assert all(answer.status == 200 for answer in answers)
    assert len({answer.text for answer in answers}) == 20
    assert len(upstream.exchanges) == 20


async def test_an_own_connection_for_each_client_is_fine(client: Client) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        for _ in range(3):
            async with session.post(f"{client.url}/v1/chat/completions", json=chat_body("hello")) as response:
                assert response.status == 200
