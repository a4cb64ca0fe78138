"""A near answer as an example for a cheaper model, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway.app import open_gateway
from gateway.settings import SettingsError
from loadtest.scripted import answer_text
from tests.fakes import ScriptedUpstream, error_reply, refused_url
from tests.gateway.harness import Answer, Client, chat_body, comparing, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

CACHE: dict[str, Any] = {
    "categories": {"shown": {"threshold": 0.97, "example": {"model": "small", "similarity": 0.5}}},
    "rules": [{"category": "shown", "when": {"model": "large"}}],
}
ASKED = "What is the capital of France?"
NEAR = "What is the capital of Germany?"
FAR = "How long does it take to boil an egg?"


def settings_with(data: Path, built: Path, large: str, small: str) -> Any:
    upstreams = [
        {"name": "large", "kind": "openai", "url": large, "models": ["large"]},
        {"name": "small", "kind": "openai", "url": small, "models": ["small"]},
    ]
    return comparing(data, built, cache=CACHE, upstreams=upstreams)


class Two:
    """A gateway before an expensive and a cheaper backend."""

    def __init__(self, client: Client, large: ScriptedUpstream, small: ScriptedUpstream, namespace: str) -> None:
        self.client, self.large, self.small, self.namespace = client, large, small, namespace

    async def ask(self, text: str, model: str = "large", **headers: str) -> Answer:
        return await self.post(chat_body(text, model=model), **headers)

    async def post(self, body: dict[str, Any], **headers: str) -> Answer:
        return await self.client.post("/v1/chat/completions", body, x_hitpath_namespace=self.namespace, **headers)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    built: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Client, ScriptedUpstream, ScriptedUpstream]]:
    data, large, small = tmp_path_factory.mktemp("data"), ScriptedUpstream(), ScriptedUpstream()
    async with large, small, serving(settings_with(data, built, large.url, small.url)) as client:
        yield client, large, small


@pytest.fixture
def two(served: tuple[Client, ScriptedUpstream, ScriptedUpstream], request: pytest.FixtureRequest) -> Two:
    client, large, small = served
    large.exchanges.clear()
    small.exchanges.clear()
    return Two(client, large, small, request.node.name)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_near_answer_is_shown_to_the_cheaper_model(two: Two, stream: bool) -> None:
    first = await two.ask(ASKED)
    shown = await two.post(chat_body(NEAR, model="large", stream=stream))
    assert shown.cache == "hitpath; fwd=miss; fwd-status=200; stored; detail=example"
    assert shown.headers["x-hitpath-upstream"] == "small"
    assert float(shown.headers["x-hitpath-similarity"]) < 0.97
    assert (len(two.large.exchanges), len(two.small.exchanges)) == (1, 1)
    sent = two.small.exchanges[0].json()
    assert sent["model"] == "small"
    assert sent["messages"] == [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": NEAR},
    ]
    assert shown.text == answer_text("small", NEAR)
    models = {event["model"] for event in shown.events()} if stream else {shown.json()["model"]}
    assert models == {"small"}


async def test_what_the_cheaper_model_said_is_kept_as_its_own(two: Two) -> None:
    await two.ask(ASKED)
    shown = await two.ask(NEAR)
    again = await two.ask(NEAR)
    assert again.cache.startswith("hitpath; hit; ttl=")
    assert again.cache.endswith("; detail=example")
    assert again.body == shown.body
    assert again.headers["x-hitpath-upstream"] == "small"
    assert len(two.small.exchanges) == 1
    # The entry says whose answer it is, and is no neighbour of anything.
    bare = await two.ask(NEAR, cache_control="no-cache")
    assert bare.headers["x-hitpath-upstream"] == "large"
    assert bare.text == answer_text("large", NEAR)
    exact = await two.ask(NEAR)
    assert exact.cache.endswith("; detail=exact")
    assert exact.text == answer_text("large", NEAR)
    # Nor is it what the cheaper model says to the bare question.
    small = await two.ask(NEAR, "small")
    assert "fwd=miss" in small.cache


async def test_an_example_is_no_example_of_itself(two: Two) -> None:
    await two.ask(ASKED)
    await two.ask(NEAR)
    await two.ask("What is the capital of Austria?")
    assert two.small.exchanges[1].json()["messages"][0]["content"] == ASKED


async def test_what_is_not_near_goes_to_the_model_asked_for(two: Two) -> None:
    await two.ask(ASKED)
    far = await two.ask(FAR)
    assert far.headers["x-hitpath-upstream"] == "large"
    assert far.cache == "hitpath; fwd=miss; fwd-status=200; stored"


async def test_what_may_be_served_is_served(two: Two) -> None:
    await two.ask(ASKED)
    served = await two.ask("What's the capital of France?")
    assert served.cache.endswith("; detail=semantic")
    assert not two.small.exchanges


@pytest.mark.parametrize(
    "headers", [{"x_hitpath_mode": "exact"}, {"cache_control": "no-cache"}, {"x_hitpath_category": "general"}]
)
async def test_who_does_not_want_it_gets_the_model_asked_for(two: Two, headers: dict[str, str]) -> None:
    await two.ask(ASKED)
    answer = await two.post(chat_body(NEAR, model="large"), **headers)
    assert answer.headers["x-hitpath-upstream"] == "large"
    assert not two.small.exchanges


async def test_only_if_cached_asks_nobody(two: Two) -> None:
    await two.ask(ASKED)
    assert (await two.ask(NEAR, cache_control="only-if-cached")).status == 504
    await two.ask(NEAR)
    assert (await two.ask(NEAR, cache_control="only-if-cached")).cache.endswith("; detail=example")


@pytest.mark.parametrize("status", [400, 429, 500])
async def test_a_cheaper_model_that_fails_costs_a_moment_only(two: Two, status: int) -> None:
    await two.ask(ASKED)
    two.small.script(error_reply(status))
    answer = await two.ask(NEAR)
    assert answer.status == 200
    assert answer.headers["x-hitpath-upstream"] == "large"
    assert answer.text == answer_text("large", NEAR)


async def test_a_cheaper_model_that_is_down_costs_a_moment_only(built: Path, tmp_path: Path) -> None:
    large, data = ScriptedUpstream(), tmp_path
    await large.start()
    async with serving(settings_with(data, built, large.url, refused_url())) as client:
        two = Two(client, large, large, "down")
        await two.ask(ASKED)
        assert (await two.ask(NEAR)).headers["x-hitpath-upstream"] == "large"
    await large.stop()


async def test_a_model_that_nobody_serves_stops_the_start(built: Path, tmp_path: Path) -> None:
    upstreams = [{"name": "large", "kind": "openai", "url": refused_url(), "models": ["large"]}]
    settings = comparing(tmp_path, built, cache=CACHE, upstreams=upstreams)
    with pytest.raises(SettingsError, match=r"cache.categories.shown.example.model: the model 'small' is not served"):
        async with open_gateway(settings):
            pass
