"""The recorded exchanges of the real API, with the gateway between the client and the recording."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from gateway.wire.endpoints import WIRES
from tests.conformance.cassettes import Exchange, parameters
from tests.fakes import Exchange as Arrived
from tests.fakes import Reply, ScriptedUpstream
from tests.gateway.harness import Answer, Client, serving, settings_for
from tests.gateway.wire.answers import payloads

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}
OWN_CONNECTION = frozenset({"host", "connection", "content-length", "transfer-encoding"})
"""Request headers of the recorded connection, not of the recorded call."""

KEEPS = {"default": {"freshness": {"now": "15m"}}}
"""Some of the recorded questions are about the weather, whose answers are not kept otherwise."""


@dataclass(frozen=True)
class Behind:
    """One gateway for all recordings, which takes longer to start than to ask; each test has a namespace of its own."""

    client: Client
    upstream: ScriptedUpstream
    namespace: str

    async def ask(self, exchange: Exchange, *, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {**sent_headers(exchange), "x-hitpath-namespace": self.namespace, **named}
        data = exchange.request_body if body is None else body
        return await self.client.ask("POST", path_of(exchange), headers=sent, data=data)

    def record(self, exchange: Exchange, times: int = 1) -> None:
        self.upstream.exchanges.clear()
        reply = Reply((exchange.response_body,), exchange.status, exchange.headers_to_send)
        self.upstream.script(*[reply] * times)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Client, ScriptedUpstream]]:
    upstream, data_dir = ScriptedUpstream(), tmp_path_factory.mktemp("recordings")
    async with upstream, serving(settings_for(data_dir, upstream, cache=KEEPS)) as client:
        yield client, upstream


@pytest.fixture
def behind(gateway: tuple[Client, ScriptedUpstream], request: pytest.FixtureRequest) -> Behind:
    return Behind(*gateway, request.node.name)


def path_of(exchange: Exchange) -> str:
    """Azure has the deployment in its path; behind the gateway all speak the one form."""
    return exchange.path if exchange.endpoint is None else PATHS[exchange.endpoint]


def sent_headers(exchange: Exchange) -> dict[str, str]:
    return {name: value for name, value in exchange.request_headers.items() if name not in OWN_CONNECTION}


def assert_same_answer(answer: Answer, exchange: Exchange) -> None:
    assert answer.status == exchange.status
    assert answer.body == exchange.response_body
    wanted = exchange.headers_to_send
    assert {name: answer.headers.get(name) for name in wanted} == dict(wanted)


def assert_same_request(arrived: Arrived, exchange: Exchange, *, but: frozenset[str] = frozenset()) -> None:
    assert (arrived.method, arrived.path) == ("POST", path_of(exchange))
    assert arrived.body == exchange.request_body
    wanted = {name: value for name, value in sent_headers(exchange).items() if name not in but}
    assert {name: arrived.headers.get(name) for name in wanted} == wanted


def merged(exchange: Exchange, stream: bytes) -> Any:
    assert exchange.endpoint is not None
    return WIRES[exchange.endpoint].merge(payloads(stream))


def said(exchange: Exchange) -> Any:
    """The recorded answer as one document."""
    body = exchange.response_body
    return merged(exchange, body) if exchange.streams else orjson.loads(body)


def content(answer: Answer, exchange: Exchange) -> Any:
    """What a client got, as one document."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return merged(exchange, answer.body)
    return answer.json()


def in_form(exchange: Exchange, *, stream: bool) -> bytes:
    """The recorded call in one of the two forms, usage included."""
    body = orjson.loads(exchange.request_body)
    body.pop("stream_options", None)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": False}
    return orjson.dumps({**body, **options})


def is_passed(exchange: Exchange) -> bool:
    return exchange.endpoint is None


def is_cached_path(exchange: Exchange) -> bool:
    return exchange.endpoint is not None


def is_error(exchange: Exchange) -> bool:
    return is_cached_path(exchange) and exchange.status != 200


def is_answer(exchange: Exchange) -> bool:
    return is_cached_path(exchange) and exchange.status == 200


def is_truncated(exchange: Exchange) -> bool:
    if not is_answer(exchange) or exchange.endpoint == "embeddings":
        return False
    return any(choice["finish_reason"] == "length" for choice in said(exchange)["choices"])


def is_stored(exchange: Exchange) -> bool:
    return is_answer(exchange) and not is_truncated(exchange)


def is_generated(exchange: Exchange) -> bool:
    return is_stored(exchange) and exchange.endpoint != "embeddings"


@pytest.mark.parametrize("exchange", parameters(is_passed))
async def test_other_paths_pass_byte_for_byte(behind: Behind, exchange: Exchange) -> None:
    # The recordings leave out the multipart bodies of audio: what stands in their place passes as it is.
    behind.record(exchange)
    answer = await behind.ask(exchange)
    assert_same_answer(answer, exchange)
    assert not {name for name in answer.headers if name.startswith("x-hitpath-")}
    assert_same_request(behind.upstream.exchanges[0], exchange)


@pytest.mark.parametrize("exchange", parameters(is_cached_path))
async def test_what_may_not_be_stored_passes_byte_for_byte(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange)
    answer = await behind.ask(exchange, cache_control="no-store")
    assert_same_answer(answer, exchange)
    assert answer.cache == f"hitpath; fwd=bypass; fwd-status={exchange.status}; detail=no-store"
    assert_same_request(behind.upstream.exchanges[0], exchange)
    assert (await behind.ask(exchange, cache_control="only-if-cached")).status == 504


@pytest.mark.parametrize("exchange", parameters(is_error))
async def test_errors_pass_unchanged_and_are_never_stored(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange, times=2)
    for _ in range(2):
        answer = await behind.ask(exchange)
        assert_same_answer(answer, exchange)
        assert answer.cache == f"hitpath; fwd=miss; fwd-status={exchange.status}; detail=error-status"
    assert len(behind.upstream.exchanges) == 2


@pytest.mark.parametrize("exchange", parameters(is_truncated))
async def test_truncated_answers_pass_and_are_never_stored(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange, times=2)
    for _ in range(2):
        answer = await behind.ask(exchange)
        assert_same_answer(answer, exchange)
        assert "fwd=miss" in answer.cache
    assert len(behind.upstream.exchanges) == 2


@pytest.mark.parametrize("exchange", parameters(is_stored))
async def test_a_miss_is_the_recording_and_the_next_is_a_hit(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange)
    missed = await behind.ask(exchange)
    assert_same_answer(missed, exchange)
    assert missed.cache == "hitpath; fwd=miss; fwd-status=200; stored"
    hit = await behind.ask(exchange)
    assert "detail=exact" in hit.cache
    assert content(hit, exchange) == said(exchange)
    assert hit.headers["content-type"].partition(";")[0] == missed.headers["content-type"].partition(";")[0]
    if not exchange.streams:
        assert hit.body == exchange.response_body
    assert len(behind.upstream.exchanges) == 1


@pytest.mark.parametrize("exchange", parameters(lambda exchange: is_stored(exchange) and not exchange.streams))
async def test_the_backend_gets_the_recorded_bytes(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange)
    await behind.ask(exchange)
    # A cached answer must be readable, so it is asked for without compression.
    assert_same_request(behind.upstream.exchanges[0], exchange, but=frozenset({"accept-encoding"}))
    assert behind.upstream.exchanges[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("exchange", parameters(lambda exchange: is_answer(exchange) and exchange.streams))
async def test_of_a_stream_only_its_usage_is_asked_for_in_addition(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange)
    await behind.ask(exchange)
    asked = orjson.loads(exchange.request_body)
    assert behind.upstream.exchanges[0].json() == {**asked, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("exchange", parameters(is_generated))
async def test_a_recorded_answer_is_read_in_both_forms_with_equal_content(behind: Behind, exchange: Exchange) -> None:
    behind.record(exchange)
    await behind.ask(exchange)
    for stream in (not exchange.streams, exchange.streams):
        answer = await behind.ask(exchange, body=in_form(exchange, stream=stream))
        assert "detail=exact" in answer.cache
        assert answer.headers["content-type"].startswith("text/event-stream") is stream
        assert content(answer, exchange) == said(exchange)
    assert len(behind.upstream.exchanges) == 1


@pytest.mark.parametrize("exchange", parameters(lambda exchange: exchange.name in ("chat-streaming", "chat-tools")))
async def test_a_recorded_answer_survives_a_restart(tmp_path: Path, exchange: Exchange) -> None:
    async with ScriptedUpstream() as upstream:
        settings = settings_for(tmp_path, upstream, cache=KEEPS)
        async with serving(settings) as client:
            behind = Behind(client, upstream, "")
            behind.record(exchange)
            await behind.ask(exchange)
        async with serving(settings) as client:
            assert content(await Behind(client, upstream, "").ask(exchange), exchange) == said(exchange)
        assert len(upstream.exchanges) == 1
