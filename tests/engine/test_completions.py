"""What answers look like, whole and streamed, with a runner that says what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tokenizers import AddedToken

from engine.checkpoint import Checkpoint
from engine.runner import Event, Failed, Finished, Job, Progress, Prompted
from engine.sampling import Choice
from engine.sequence import Used
from engine.server import Delivery, Engine, Pace, tenant
from tests.engine import checkpoints
from tests.engine.scripted import ScriptedRunner, family, quiet_metrics, run, scripted, spoken

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
WITH_TOOLS = checkpoints.TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}"
FUNCTION = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = '{"at": "Ulm"}'


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return family(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tags = [AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")]
    return family(tmp_path_factory.mktemp("hermes"), *tags, template=WITH_TOOLS + "{# <tool_call> #}")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tokens = [AddedToken("[TOOL_CALLS]", special=True), AddedToken("[INST]", special=True)]
    return family(tmp_path_factory.mktemp("mistral"), *tokens, template=WITH_TOOLS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return family(tmp_path_factory.mktemp("llama"), AddedToken("<|python_tag|>", special=True), template=WITH_TOOLS)


def says(checkpoint: Checkpoint, text: str, **settings: Any) -> Callable[[Job], Sequence[Event]]:
    return lambda _: spoken(checkpoint, text, **settings)


async def test_usage_tells_what_was_cached(plain: Checkpoint) -> None:
    def script(job: Job) -> list[Event]:
        return spoken(plain, "ok", cached=3 if job.parent is None else 8)

    async with scripted(plain, script) as (client, _):
        answer = await client.completions.create(model="tiny", prompt=["aaaa", "bbbb"], n=2)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 8
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 6
        stream = await client.completions.create(
            model="tiny", prompt=["aaaa", "bbbb"], n=2, stream=True, stream_options={"include_usage": True}
        )
        assert [chunk.usage async for chunk in stream][-1] == answer.usage


async def test_a_header_tells_what_chunks_did(plain: Checkpoint) -> None:
    tiers = {"aaaa": ("memory", 3), "bbbb": ("disk", 2), "cccc": ("none", 0)}

    def script(job: Job) -> list[Event]:
        tier, chunks = tiers[plain.tokenizer.decode(job.prompt)]
        return [Prompted(1, (), chunks, Used(chunks, chunks, 2 * chunks, tier)), *spoken(plain, "ok")[1:]]

    async with scripted(plain, script) as (client, _):
        raw = await client.completions.with_raw_response.create(model="tiny", prompt=[*tiers], n=2)
        assert raw.headers["x-hitpath-kv"] == "prefix=3; chunks=5; recomputed=10; tier=disk"
        usage = raw.parse().usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 3 + 5
        streamed = await client.completions.with_raw_response.create(model="tiny", prompt="aaaa", stream=True)
        assert streamed.headers["x-hitpath-kv"] == "prefix=1; chunks=3; recomputed=6; tier=memory"
        assert "".join([chunk.choices[0].text async for chunk in streamed.parse()]) == "ok"


async def test_a_request_may_want_it_exact_and_nothing_else(plain: Checkpoint) -> None:
    async with scripted(plain, says(plain, "ok")) as (client, runner):
        for headers in ({}, {"x-hitpath-kv": "exact"}):
            await client.chat.completions.create(model="tiny", messages=HELLO, extra_headers=headers)
        assert [job.exact for job in runner.jobs] == [False, True]
        with pytest.raises(openai.BadRequestError, match="'exact'") as refused:
            await client.completions.create(model="tiny", prompt="a", extra_headers={"x-hitpath-kv": "off"})
        assert refused.value.param == "x-hitpath-kv"


async def test_a_stream_that_fails_before_it_begins_is_an_error_and_no_stream(plain: Checkpoint) -> None:
    async with scripted(plain, lambda _: [Failed("Out of memory.", status=503, code="out_of_memory")]) as (client, _):
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert (failed.value.status_code, failed.value.code) == (503, "out_of_memory")


async def test_who_leaves_before_a_stream_begins_ends_its_jobs(plain: Checkpoint) -> None:
    delivery, gone = Delivery(), asyncio.Event()
    runner = ScriptedRunner(lambda _: [], delivery)
    engine = Engine(plain, runner, context=1000, delivery=delivery, metrics=quiet_metrics())
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
    asked = asyncio.create_task(run(engine.application(), {"path": "/v1/completions"}, body, gone))
    while not runner.jobs:
        await asyncio.sleep(0.01)
    gone.set()
    sent = await asked
    assert runner.cancelled == runner.jobs
    assert [message.get("status") for message in sent] == [499, None]


async def test_the_choices_of_a_prompt_name_the_first(plain: Checkpoint) -> None:
    async with scripted(plain, says(plain, "ok")) as (client, runner):
        await client.completions.create(model="tiny", prompt=["a", "b"], n=2, seed=1)
    first, second, third, fourth = runner.jobs
    assert (first.parent, second.parent, third.parent, fourth.parent) == (None, first, None, third)
    assert [job.params.seed for job in runner.jobs] == [1, 2, 1, 2]
    assert runner.cancelled == runner.jobs


async def test_characters_are_never_cut(plain: Checkpoint) -> None:
    async with scripted(plain, says(plain, "é 😀 漢")) as (client, _):
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        pieces = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices[0].delta.content]
    assert pieces == ["é", " ", "😀", " ", "漢"]


async def test_log_probabilities_of_a_stream_add_up(plain: Checkpoint) -> None:
    async with scripted(plain, says(plain, "é!", scored=True)) as (client, _):
        asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
        whole = (await client.chat.completions.create(**asked)).choices[0].logprobs
        stream = await client.chat.completions.create(**asked, stream=True)
        scored = [logprobs async for chunk in stream if (logprobs := chunk.choices[0].logprobs)]
    assert whole is not None
    assert whole.content == [token for part in scored for token in part.content or ()]
    assert [token.bytes for token in whole.content] == [[0xC3], [0xA9], [33]]


def scored_prompt(checkpoint: Checkpoint, job: Job) -> list[Event]:
    choices = (None, *(Choice(token, -1.0, ((token, -1.0),)) for token in job.prompt[1:]))
    prompted = Prompted(0, choices if job.prompt_logprobs else ())
    if job.params.max_tokens == 0:
        return [prompted, Finished("length", "", 0)]
    return [prompted, *spoken(checkpoint, "é.", scored=job.params.logprobs is not None)[1:]]


async def test_echo_gives_prompt_and_scores(plain: Checkpoint) -> None:
    async with scripted(plain, lambda job: scored_prompt(plain, job)) as (client, runner):
        asked: dict[str, Any] = {"model": "tiny", "echo": True}
        answer = await client.completions.create(**asked, prompt="ab", logprobs=1)
        choice = answer.choices[0]
        assert choice.text == "abé."
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["a", "b", "\ufffd", "\ufffd", "."]
        assert choice.logprobs.token_logprobs == [None, -1.0, -0.5, -0.5, -0.5]
        assert choice.logprobs.top_logprobs is not None
        assert choice.logprobs.top_logprobs[:2] == [None, {"b": -1.0}]
        assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
        stream = await client.completions.create(**asked, prompt="ab", logprobs=1, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(chunk.logprobs, field) for chunk in chunks if chunk.logprobs]
            assert [item for part in parts for item in part] == getattr(choice.logprobs, field)
        nothing = await client.completions.create(**asked, prompt=[[97, 98], [99]], max_tokens=0, logprobs=0, n=2)
        assert [c.logprobs.token_logprobs for c in nothing.choices if c.logprobs] == [[None, -1.0]] * 2 + [[None]] * 2
        assert all(job.prompt_logprobs and job.parent is None for job in runner.jobs)
        bare = await client.completions.create(**asked, prompt=[257, 97], max_tokens=0)
        assert (bare.choices[0].text, bare.choices[0].finish_reason) == (decoded(plain, [257, 97]), "length")
        assert not runner.jobs[-1].prompt_logprobs


def decoded(checkpoint: Checkpoint, ids: list[int]) -> str:
    return checkpoint.tokenizer.decode(ids)


async def calls_of(client: openai.AsyncOpenAI, **asked: Any) -> tuple[str | None, list[tuple[str, str]], str | None]:
    """Content, calls and reason, after checking that the stream says the same."""
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, **asked}
    choice = (await client.chat.completions.create(**request)).choices[0]
    calls = [
        (call.function.name, call.function.arguments)
        for call in choice.message.tool_calls or ()
        if call.type == "function"
    ]
    text, reason = "", None
    streamed: list[tuple[str | None, str]] = []
    async for chunk in await client.chat.completions.create(**request, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
        for part in delta.tool_calls or ():
            assert part.function is not None
            if part.id is not None:
                assert part.index == len(streamed)
                streamed.append((part.function.name, ""))
            name, arguments = streamed[part.index]
            streamed[part.index] = (name, arguments + (part.function.arguments or ""))
    assert (text, streamed, reason) == (choice.message.content or "", calls, choice.finish_reason)
    return choice.message.content, calls, choice.finish_reason


async def test_tool_calls_of_each_family(hermes: Checkpoint, mistral: Checkpoint, llama: Checkpoint) -> None:
    call = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
    texts = {
        "hermes": (hermes, f"<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>", 2),
        "mistral": (mistral, f"[TOOL_CALLS][{call}, {call}]", 2),
        "llama": (llama, f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}', 1),
    }
    for checkpoint, text, count in texts.values():
        async with scripted(checkpoint, says(checkpoint, text)) as (client, _):
            assert await calls_of(client) == (None, [("weather", ARGUMENTS)] * count, "tool_calls")
            alone = await calls_of(client, parallel_tool_calls=False)
            assert alone == (None, [("weather", ARGUMENTS)], "tool_calls")


async def test_text_before_a_call_and_text_that_is_no_call(hermes: Checkpoint) -> None:
    call = f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'
    async with scripted(hermes, says(hermes, f"Well…\n{call}")) as (client, _):
        assert await calls_of(client) == ("Well…", [("weather", ARGUMENTS)], "tool_calls")
        assert await calls_of(client, tool_choice="none") == (f"Well…\n{call}", [], "stop")
    async with scripted(hermes, says(hermes, call[:-20])) as (client, _):
        assert await calls_of(client) == (call[:-20], [], "stop")


async def test_log_probabilities_beside_a_call_are_all_there(hermes: Checkpoint) -> None:
    call = f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'
    async with scripted(hermes, says(hermes, call, scored=True)) as (client, _):
        request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "logprobs": True}
        stream = await client.chat.completions.create(**request, stream=True)
        parts = [chunk.choices[0].logprobs async for chunk in stream]
    scored = [token.token for part in parts if part for token in part.content or ()]
    assert "".join(scored) == call


async def test_calls_that_cannot_be_required_are_refused(plain: Checkpoint, tmp_path: Path) -> None:
    async with scripted(plain, says(plain, "ok")) as (client, _):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
        assert refused.value.param == "tools"
    no_format = family(tmp_path, template=WITH_TOOLS)
    async with scripted(no_format, says(no_format, "ok")) as (client, _):
        assert await calls_of(client) == ("ok", [], "stop")
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required")
        assert refused.value.param == "tool_choice"


async def test_a_failure_is_told_with_its_status(plain: Checkpoint) -> None:
    def script(_: Job) -> list[Event]:
        return [Prompted(0), Progress("a", Choice(64)), Failed("Out of memory.", status=503, code="out_of_memory")]

    async with scripted(plain, script) as (client, _):
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="tiny", messages=HELLO)
        assert (failed.value.status_code, failed.value.code) == (503, "out_of_memory")
        with pytest.raises(openai.APIError, match="Out of memory"):
            async for _ in await client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
                pass


async def test_a_full_queue_tells_when_to_come_back(plain: Checkpoint) -> None:
    async with scripted(plain, says(plain, "ok"), room=1) as (client, _):
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="tiny", prompt="a", n=2)
        assert int(full.value.response.headers["retry-after"]) >= 1


def test_the_wait_follows_from_queue_and_pace() -> None:
    now = 100.0
    pace = Pace(lambda: now)
    assert pace.retry_after(50) == 1
    for _ in range(3):
        pace.finished()
        now += 1.0
    now = 102.0
    assert pace.retry_after(0) == 1
    assert pace.retry_after(7) == 7
    assert pace.retry_after(10_000) == 60
    now = 110.0
    assert pace.retry_after(7) == 35


def test_who_is_one_tenant() -> None:
    one, other = ({"authorization": f"Bearer {name}"} for name in "ab")
    assert tenant({}, None) == ""
    assert tenant(one, None) == tenant(dict(one), None) != tenant(other, None)
    assert tenant(one, None) != "a"
    assert tenant({**one, "x-hitpath-tenant": "acme"}, None) == "acme"
    assert len({tenant(one, None), tenant(one, "x"), tenant(one, "y"), tenant(other, "x")}) == 4


async def test_tenant_and_salt_reach_the_jobs(plain: Checkpoint) -> None:
    async with scripted(plain, says(plain, "ok")) as (client, runner):
        await client.completions.create(
            model="tiny", prompt="a", extra_headers={"x-hitpath-tenant": "acme"}, extra_body={"cache_salt": "s"}
        )
    assert runner.jobs[0].tenant == "acme\x00s"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_jobs(plain: Checkpoint, stream: bool) -> None:
    delivery = Delivery()
    runner = ScriptedRunner(lambda _: [Prompted(0), Progress("a", Choice(64))], delivery)
    delivery.open()
    application = Engine(plain, runner, context=100, delivery=delivery, metrics=quiet_metrics()).application()
    body = json.dumps({"prompt": "a", "stream": stream, "n": 2}).encode()
    gone = asyncio.Event()
    served = asyncio.create_task(run(application, {"path": "/v1/completions"}, body, gone))
    async with asyncio.timeout(20):
        while not runner.jobs:
            await asyncio.sleep(0.01)
        assert runner.cancelled == []
        gone.set()
        sent = await served
    assert runner.cancelled == runner.jobs
    assert sent[0]["status"] == (200 if stream else 499)


async def test_what_happened_together_goes_out_together(plain: Checkpoint) -> None:
    delivery = Delivery()
    runner = ScriptedRunner(says(plain, "a" * 50), delivery)
    delivery.open()
    application = Engine(plain, runner, context=100, delivery=delivery, metrics=quiet_metrics()).application()
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    sent = await run(application, {"path": "/v1/completions"}, body, asyncio.Event())
    assert len(sent) <= 5
    assert b"".join(message.get("body", b"") for message in sent).count(b"data: ") == 52
