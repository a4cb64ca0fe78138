"""The official client, over a real socket: it must not notice the gateway, but for its headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from loadtest.scripted import answer_text
from tests.fakes import End, Hang, NotHttp, Reply, ScriptedUpstream, error_reply, json_reply, refused_url, stream_reply
from tests.gateway.harness import Client, serving, settings_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER: Any = {"role": "user", "content": "what?"}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ENVELOPE = {"id": "chatcmpl-1", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def completion(message: dict[str, Any], finish: str = "stop") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": finish}
    return json_reply({**ENVELOPE, "object": "chat.completion", "choices": [choice], "usage": USAGE})


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return {**ENVELOPE, "object": "chat.completion.chunk", "choices": [choice]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Client, ScriptedUpstream]]:
    """One gateway for all; each test has a namespace of its own."""
    upstream, data_dir = ScriptedUpstream(), tmp_path_factory.mktemp("data")
    async with upstream, serving(settings_for(data_dir, upstream)) as client:
        yield client, upstream


@pytest.fixture
def upstream(served: tuple[Client, ScriptedUpstream]) -> ScriptedUpstream:
    served[1].exchanges.clear()
    return served[1]


@pytest.fixture
def options(served: tuple[Client, ScriptedUpstream], request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "base_url": f"{served[0].url}/v1",
        "api_key": "k",
        "max_retries": 0,
        "default_headers": {"x-hitpath-namespace": request.node.name},
    }


@pytest_asyncio.fixture(loop_scope="module")
async def client(options: dict[str, Any]) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(**options) as client:
        yield client


@pytest.fixture
def blocking(options: dict[str, Any]) -> Iterator[OpenAI]:
    with OpenAI(**options) as client:
        yield client


def status(raw: Any) -> str:
    return str(raw.headers["cache-status"])


async def ask(client: AsyncOpenAI, **fields: Any) -> tuple[ChatCompletion, str]:
    raw = await client.chat.completions.with_raw_response.create(model="m", messages=[USER], **fields)
    return raw.parse(), status(raw)


async def stream(client: AsyncOpenAI, **fields: Any) -> tuple[list[ChatCompletionChunk], str]:
    raw = await client.chat.completions.with_raw_response.create(model="m", messages=[USER], stream=True, **fields)
    events: AsyncStream[ChatCompletionChunk] = raw.parse()
    return [chunk async for chunk in events], status(raw)


async def both(client: AsyncOpenAI, **fields: Any) -> tuple[ChatCompletion, ChatCompletion]:
    """The same call as one answer, and as a stream that the client's own helper adds up."""
    whole, _ = await ask(client, **fields)
    async with client.chat.completions.stream(model="m", messages=[USER], **fields) as events:
        final = (await events.get_final_completion()).model_dump()
    # What the helper adds of its own.
    for message in (choice["message"] for choice in final["choices"]):
        del message["parsed"]
        for call in message["tool_calls"] or ():
            del call["index"], call["function"]["parsed_arguments"]
    return whole, ChatCompletion.model_validate(final)


def spoken(chunks: list[ChatCompletionChunk], choice: int = 0) -> str:
    parts = [part.delta.content or "" for chunk in chunks for part in chunk.choices if part.index == choice]
    return "".join(parts)


# --- chat ----------------------------------------------------------------------------------------------------------


async def test_a_chat_misses_then_hits(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    first, missed = await ask(client)
    second, hit = await ask(client)
    assert missed == "hitpath; fwd=miss; fwd-status=200; stored"
    assert hit.startswith("hitpath; hit; ttl=")
    assert first == second
    assert first.choices[0].message.content == answer_text("m", "what?")
    assert len(upstream.exchanges) == 1
    assert upstream.exchanges[0].headers["authorization"] == "Bearer k"


async def test_a_stream_misses_then_hits(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    first, missed = await stream(client)
    second, hit = await stream(client)
    assert "fwd=miss" in missed
    assert "detail=exact" in hit
    assert spoken(first) == spoken(second) == answer_text("m", "what?")
    assert first[-1].choices[0].finish_reason == second[-1].choices[0].finish_reason == "stop"
    assert {chunk.id for chunk in first} == {chunk.id for chunk in second}
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("streamed_first", [True, False])
async def test_one_answer_serves_both_forms(
    client: AsyncOpenAI, upstream: ScriptedUpstream, streamed_first: bool
) -> None:
    if streamed_first:
        await stream(client)
    whole, streamed = await both(client)
    assert whole.choices == streamed.choices
    assert len(upstream.exchanges) == 1


async def test_usage_is_streamed_to_who_asks(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    without, _ = await stream(client)
    asked = {"stream_options": {"include_usage": True}}
    hit, told = await stream(client, **asked)
    missed, _ = await stream(client, **asked, extra_headers={"cache-control": "no-cache"})
    assert all(chunk.usage is None and chunk.choices for chunk in without)
    assert "detail=exact" in told
    for chunks in (hit, missed):
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 16
    assert len(upstream.exchanges) == 2


async def test_a_tool_is_called_and_its_result_is_told(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    tools: Any = {"tools": [WEATHER], "tool_choice": "required"}
    whole, streamed = await both(client, **tools)
    calls = whole.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == "weather"
    assert whole.choices[0].finish_reason == "tool_calls"
    assert streamed.choices[0].message.tool_calls == calls
    said: Any = whole.choices[0].message.model_dump(exclude_none=True)
    turns = [USER, said, {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}]
    for outcome in ("fwd=miss", "detail=exact"):
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=turns, tools=[WEATHER])
        assert outcome in status(raw)
    assert len(upstream.exchanges) == 2
    assert upstream.exchanges[1].json()["messages"] == turns


CALLS = [
    {"id": f"call_{number}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city":"{city}"}}'}}
    for number, city in enumerate(("Zürich", "Paris"))
]


def streamed_calls() -> list[dict[str, Any]]:
    """Two calls at once, their arguments in pieces that interleave."""
    heads = [{**call, "function": {"name": "weather", "arguments": ""}} for call in CALLS]
    parts = [{"index": number, **head} for number, head in enumerate(heads)]
    arguments = [call["function"]["arguments"] for call in CALLS]  # type: ignore[index]
    for at in range(0, max(map(len, arguments)), 4):
        parts += [
            {"index": number, "function": {"arguments": text[at : at + 4]}} for number, text in enumerate(arguments)
        ]
    chunks = [delta(role="assistant", content=None), *(delta(tool_calls=[part]) for part in parts)]
    return [*chunks, delta("tool_calls"), {**delta(), "choices": [], "usage": USAGE}]


@pytest.mark.parametrize("reply", [completion({"tool_calls": CALLS}, "tool_calls"), stream_reply(*streamed_calls())])
async def test_parallel_calls_keep_their_places(client: AsyncOpenAI, upstream: ScriptedUpstream, reply: Reply) -> None:
    upstream.script(reply)
    if "event-stream" in reply.headers["content-type"]:
        await stream(client, tools=[WEATHER])
    for answer in await both(client, tools=[WEATHER]):
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        assert [call.model_dump(exclude_none=True) for call in calls] == CALLS
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
    assert len(upstream.exchanges) == 1


async def test_log_probabilities(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    whole, streamed = await both(client, logprobs=True, top_logprobs=0)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == answer_text("m", "what?")
    assert streamed.choices[0].logprobs == logprobs
    assert len(upstream.exchanges) == 1


async def test_several_choices(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    whole, streamed = await both(client, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert streamed.choices == whole.choices
    chunks, hit = await stream(client, n=3)
    assert "detail=exact" in hit
    assert {spoken(chunks, choice) for choice in range(3)} == {answer_text("m", "what?")}
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_reasoning(client: AsyncOpenAI, upstream: ScriptedUpstream, field: str, streamed: bool) -> None:
    if streamed:
        thoughts = [delta(**{field: "two "}), delta(**{field: "steps"})]
        upstream.script(stream_reply(delta(role="assistant"), *thoughts, delta(content="42"), delta("stop")))
        await stream(client)
    else:
        upstream.script(completion({"content": "42", field: "two steps"}))
        await ask(client)
    whole, hit = await ask(client)
    assert "detail=exact" in hit
    assert (whole.choices[0].message.content, getattr(whole.choices[0].message, field)) == ("42", "two steps")
    chunks, _ = await stream(client)
    thought = [getattr(part.delta, field, None) or "" for chunk in chunks for part in chunk.choices]
    assert ("".join(thought), spoken(chunks)) == ("two steps", "42")
    assert len(upstream.exchanges) == 1


async def test_a_refusal_in_words(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(completion({"refusal": "I would rather not."}))
    whole, streamed = await both(client)
    assert whole.choices[0].message.refusal == streamed.choices[0].message.refusal == "I would rather not."


# --- the other endpoints -------------------------------------------------------------------------------------------


async def test_embeddings(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    asked: Any = {"model": "m", "input": ["one", "two"]}
    seen = [await client.embeddings.with_raw_response.create(**asked) for _ in range(2)]
    assert ["hitpath; hit" in status(raw) for raw in seen] == [False, True]
    vectors, again = (raw.parse() for raw in seen)
    assert vectors == again
    assert [item.index for item in vectors.data] == [0, 1]
    assert upstream.exchanges[0].json()["encoding_format"] == "base64"
    floats = await client.embeddings.create(**asked, encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(vectors.data[0].embedding, abs=1e-6)
    short = await client.embeddings.create(**asked, dimensions=8)
    assert [len(item.embedding) for item in short.data] == [8, 8]
    assert len(upstream.exchanges) == 3


async def test_completions(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    asked: Any = {"model": "m", "prompt": "once"}
    seen = [await client.completions.with_raw_response.create(**asked) for _ in range(2)]
    assert ["hitpath; hit" in status(raw) for raw in seen] == [False, True]
    assert seen[0].parse() == seen[1].parse()
    chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    said = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert said == seen[0].parse().choices[0].text == answer_text("m", "once")
    assert len(upstream.exchanges) == 1


async def test_responses(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    seen = [await client.responses.with_raw_response.create(model="m", input="what?") for _ in range(2)]
    assert ["hitpath; hit" in status(raw) for raw in seen] == [False, True]
    assert seen[0].parse().output_text == seen[1].parse().output_text == answer_text("m", "what?")
    async with client.responses.stream(model="m", input="what?") as events:
        deltas = [event.delta async for event in events if event.type == "response.output_text.delta"]
        final = await events.get_final_response()
    assert "".join(deltas) == final.output_text == answer_text("m", "what?")
    assert len(upstream.exchanges) == 1


async def test_a_stream_of_responses_comes_first(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    events = [event.type async for event in await client.responses.create(model="m", input="what?", stream=True)]
    assert (events[0], events[-1]) == ("response.created", "response.completed")
    assert (await client.responses.create(model="m", input="what?")).output_text == answer_text("m", "what?")
    assert len(upstream.exchanges) == 1


async def test_models(client: AsyncOpenAI, blocking: OpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["scripted-1"]
    assert await asyncio.to_thread(lambda: [model.id for model in blocking.models.list()]) == ["scripted-1"]


async def test_a_path_that_is_not_cached(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(json_reply({"id": "f1", "object": "file", "bytes": 4, "created_at": 1, "filename": "a.jsonl"}))
    made = await client.files.create(file=("a.jsonl", b"{}\n\n"), purpose="batch")
    assert made.id == "f1"
    arrived = upstream.exchanges[0]
    assert arrived.path == "/v1/files"
    assert b'filename="a.jsonl"' in arrived.body
    assert arrived.headers["content-type"].startswith("multipart/form-data; boundary=")


# --- errors --------------------------------------------------------------------------------------------------------

ERRORS = [
    (400, openai.BadRequestError),
    (401, openai.AuthenticationError),
    (403, openai.PermissionDeniedError),
    (404, openai.NotFoundError),
    (422, openai.UnprocessableEntityError),
    (429, openai.RateLimitError),
    (500, openai.InternalServerError),
    (503, openai.InternalServerError),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("code", "expected"), ERRORS)
async def test_a_backends_error_is_the_clients(
    client: AsyncOpenAI,
    upstream: ScriptedUpstream,
    code: int,
    expected: type[openai.APIStatusError],
    streamed: bool,
) -> None:
    upstream.script(error_reply(code, "no", retry_after="7"))
    with pytest.raises(expected) as caught:
        await (stream(client) if streamed else ask(client))
    assert caught.value.status_code == code
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.body == {"message": "no", "type": "server_error", "param": None, "code": None}
    # Not stored: the next one is answered.
    assert "fwd=miss" in (await ask(client))[1]


async def test_the_clients_own_retries_work(options: dict[str, Any], upstream: ScriptedUpstream) -> None:
    busy = json_reply({"error": {"message": "busy"}}, 429, {"retry-after-ms": "1"})
    upstream.script(busy, busy)
    async with AsyncOpenAI(**{**options, "max_retries": 2}) as client:
        assert "fwd=miss" in (await ask(client))[1]
    assert len(upstream.exchanges) == 3


async def test_errors_of_the_gateway_are_the_clients_too(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await ask(client, extra_headers={"x-hitpath-mode": "sometimes"})
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "x-hitpath-mode",
        "invalid_request",
        "invalid_request_error",
    )
    with pytest.raises(openai.InternalServerError) as absent:
        await ask(client, extra_headers={"cache-control": "only-if-cached"})
    assert (absent.value.status_code, absent.value.code) == (504, "not_cached")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_backend_that_refuses(tmp_path: Path, streamed: bool) -> None:
    async with (
        serving(settings_for(tmp_path, refused_url())) as gateway,
        AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await (stream(client) if streamed else ask(client))
    assert caught.value.status_code == 502
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "backend_error"
    assert caught.value.code == "backend_unreachable"


async def test_a_backend_that_talks_nonsense(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(NotHttp())
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(client)
    assert (caught.value.status_code, caught.value.code) == (502, "backend_broken")


DYING = [stream_reply(delta(content="one"), end=End.ABORT), stream_reply(delta(content="one"), done=False)]


@pytest.mark.parametrize("reply", DYING, ids=["torn", "unfinished"])
async def test_a_backend_that_dies_in_mid_stream(client: AsyncOpenAI, upstream: ScriptedUpstream, reply: Reply) -> None:
    upstream.script(reply)
    seen: list[str | None] = []
    with pytest.raises(openai.APIError) as caught:
        async for chunk in await client.chat.completions.create(model="m", messages=[USER], stream=True):
            seen.append(chunk.choices[0].delta.content)  # noqa: PERF401 - what came before the error is kept
    assert seen == ["one"]
    assert caught.value.code == "backend_broken"
    assert "fwd=miss" in (await ask(client))[1]


async def test_a_stream_that_is_closed_ends_the_backends_work(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(stream_reply(delta(content="one"), end=End.HANG))
    events = await client.chat.completions.create(model="m", messages=[USER], stream=True)
    async for _ in events:
        break
    await events.close()
    await asyncio.wait_for(upstream.exchanges[0].disconnected.wait(), 5)


async def test_a_call_that_is_cancelled_ends_the_backends_work(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script(Hang())
    asking = asyncio.create_task(ask(client))
    arrived = await upstream.arrival()
    asking.cancel()
    await asyncio.wait_for(arrived.disconnected.wait(), 5)


async def test_a_client_that_loses_patience_ends_the_backends_work(
    client: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.script(Hang())
    with pytest.raises(openai.APITimeoutError):
        await ask(client, timeout=0.5)
    await asyncio.wait_for(upstream.exchanges[0].disconnected.wait(), 5)


async def test_many_clients_at_once(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    whole = asyncio.gather(*(ask(client) for _ in range(20)))
    streamed = asyncio.gather(*(stream(client) for _ in range(20)))
    said = {answer.choices[0].message.content for answer, _ in await whole}
    assert said | {spoken(chunks) for chunks, _ in await streamed} == {answer_text("m", "what?")}
    assert len(upstream.exchanges) == 1


# --- the blocking client -------------------------------------------------------------------------------------------


async def test_the_blocking_client(blocking: OpenAI, upstream: ScriptedUpstream) -> None:
    def work() -> tuple[list[str], list[str | None]]:
        told, said = list[str](), list[str | None]()
        for _ in range(2):
            raw = blocking.chat.completions.with_raw_response.create(model="m", messages=[USER])
            told.append(status(raw))
            said.append(raw.parse().choices[0].message.content)
        streamed = blocking.chat.completions.with_raw_response.create(model="m", messages=[USER], stream=True)
        events: Stream[ChatCompletionChunk] = streamed.parse()
        said.append(spoken(list(events)))
        told.append(status(streamed))
        return told, said

    told, said = await asyncio.to_thread(work)
    assert ["hitpath; hit" in line for line in told] == [False, True, True]
    assert said == [answer_text("m", "what?")] * 3
    assert len(upstream.exchanges) == 1


async def test_the_blocking_client_on_the_other_endpoints(blocking: OpenAI, upstream: ScriptedUpstream) -> None:
    def work() -> None:
        for _ in range(2):
            assert len(blocking.embeddings.create(model="m", input="one").data) == 1
            assert blocking.completions.create(model="m", prompt="once").choices[0].text == answer_text("m", "once")
            with blocking.responses.stream(model="m", input="what?") as events:
                assert events.get_final_response().output_text == answer_text("m", "what?")

    await asyncio.to_thread(work)
    assert len(upstream.exchanges) == 3


async def test_the_blocking_client_hears_of_errors(blocking: OpenAI, upstream: ScriptedUpstream) -> None:
    def work() -> openai.RateLimitError:
        with pytest.raises(openai.RateLimitError) as caught:
            blocking.chat.completions.create(model="m", messages=[USER])
        with pytest.raises(openai.APIError, match="upstream up0"):
            list(blocking.chat.completions.create(model="m", messages=[USER], stream=True))
        return caught.value

    upstream.script(error_reply(429, "slow down", retry_after="3"), DYING[0])
    assert (await asyncio.to_thread(work)).response.headers["retry-after"] == "3"


async def test_the_blocking_client_closes_a_stream(blocking: OpenAI, upstream: ScriptedUpstream) -> None:
    def work() -> None:
        with blocking.chat.completions.create(model="m", messages=[USER], stream=True) as events:
            next(iter(events))

    upstream.script(stream_reply(delta(content="one"), end=End.HANG))
    await asyncio.to_thread(work)
    await asyncio.wait_for(upstream.exchanges[0].disconnected.wait(), 5)
