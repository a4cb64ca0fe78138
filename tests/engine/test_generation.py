"""The engine from HTTP to logits in one process, with random weights: what they would never say by themselves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tokenizers import AddedToken

from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint
from engine.executor import BLOCK_SIZE, Executor
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.server import Delivery, Engine
from tests.engine import checkpoints
from tests.engine.scripted import connected, family, quiet_metrics

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
BLOCKS, CONTEXT = 128, 1024
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "kind": {"enum": ["é", "漢字"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tags = [AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")]
    template = checkpoints.TEMPLATE + "{% if tools %}{{ tools | tojson }}{# <tool_call> #}{% endif %}"
    return family(tmp_path_factory.mktemp("hermes"), *tags, template=template)


@contextlib.asynccontextmanager
async def generating(checkpoint: Checkpoint) -> AsyncIterator[openai.AsyncOpenAI]:
    delivery = Delivery()
    books = BlockManager(BLOCKS, BLOCK_SIZE, root=b"test")
    scheduler = Scheduler(books, max_running=8, max_waiting=16, token_budget=256, patience=10.0)
    executor = Executor(checkpoint, SdpaBackend(), blocks=BLOCKS, context=CONTEXT)
    runner = Runner(checkpoint, scheduler, executor, deliver=delivery)
    engine = Engine(checkpoint, runner, context=CONTEXT, delivery=delivery, metrics=quiet_metrics())
    async with connected(engine) as client:
        yield client
    scheduler.check()
    assert books.used() == 0


async def test_random_weights_follow_a_schema(hermes: Checkpoint) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "note", "schema": SCHEMA}}
    async with generating(hermes) as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form, n=4, seed=1, max_tokens=200
        )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        note = json.loads(choice.message.content or "")
        assert list(note) == ["name", "kind"]
        assert note["kind"] in ("é", "漢字")
    assert len({choice.message.content for choice in answer.choices}) > 1


async def test_an_answer_that_cannot_go_on_ends_with_its_last_token(hermes: Checkpoint) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"const": "é"}}}
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": form, "temperature": 0}
    async with generating(hermes) as client:
        free = await client.chat.completions.create(**asked, max_tokens=50, logprobs=True)
        assert free.usage is not None
        drawn = free.choices[0].logprobs
        assert drawn is not None
        assert free.usage.completion_tokens == len(drawn.content or ())
        tight = await client.chat.completions.create(**asked, max_tokens=free.usage.completion_tokens)
    assert (free.choices[0].finish_reason, tight.choices[0].finish_reason) == ("stop", "stop")
    assert (
        json.loads(free.choices[0].message.content or "") == json.loads(tight.choices[0].message.content or "") == "é"
    )


async def test_random_weights_call_the_tool_they_must(hermes: Checkpoint) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "note"}},
        "seed": 3,
        "max_tokens": 300,
    }
    async with generating(hermes) as client:
        whole = (await client.chat.completions.create(**asked)).choices[0]
        async with client.chat.completions.stream(**asked) as stream:
            streamed = (await stream.get_final_completion()).choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    assert streamed.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    (same,) = streamed.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "note"
    assert set(json.loads(call.function.arguments)) == {"name", "kind"}
    assert call.function.arguments == same.function.arguments


async def test_an_answer_scored_as_a_prompt_has_the_same_log_probabilities(hermes: Checkpoint) -> None:
    prompt = list(range(40, 90))
    async with generating(hermes) as client:
        asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "logprobs": 1, "extra_body": {"ignore_eos": True}}
        answer = (await client.completions.create(**asked, prompt=[prompt], max_tokens=8)).choices[0]
        assert answer.logprobs is not None
        ids = [hermes.tokenizer.encode_text(text)[0] for text in answer.logprobs.tokens or () if text.isascii()]
        again = (await client.completions.create(**asked, prompt=[prompt + ids], max_tokens=0, echo=True)).choices[0]
        assert again.logprobs is not None
        scores = again.logprobs.token_logprobs or []
        assert scores[0] is None
        assert len(scores) == len(prompt) + len(ids)
        if len(ids) == 8:
            assert scores[len(prompt) :] == pytest.approx(answer.logprobs.token_logprobs, abs=1e-4)


async def test_a_known_prompt_is_not_computed_again_unless_salted(hermes: Checkpoint) -> None:
    async with generating(hermes) as client:

        async def cached(**settings: Any) -> int:
            answer = await client.completions.create(model="tiny", prompt="x" * 100, max_tokens=1, **settings)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            return answer.usage.prompt_tokens_details.cached_tokens or 0

        assert await cached() == 0
        assert await cached() >= 64
        assert await cached(extra_body={"cache_salt": "other"}) == 0
        assert await cached(extra_headers={"x-hitpath-tenant": "other"}) == 0
        assert await cached(extra_headers={"x-hitpath-tenant": "other"}) >= 64


async def test_stop_tokens_end_an_answer(hermes: Checkpoint) -> None:
    async with generating(hermes) as client:
        answer = await client.completions.create(
            model="tiny", prompt="a", max_tokens=9, logit_bias={"65": 100}, extra_body={"stop_token_ids": [65]}
        )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
