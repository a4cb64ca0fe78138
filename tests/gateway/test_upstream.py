"""Backends and the choice among them, without a gateway before them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import (
    BackendBrokenError,
    BackendTimeoutError,
    BackendUnreachableError,
    BadRequestError,
    NotReadyError,
    UnknownModelError,
)
from gateway.settings import SettingsError, Timeouts, Upstream
from gateway.upstream import Ask, Backend, Headers, Router, open_backend
from tests.fakes import (
    End,
    Exchange,
    Hang,
    NotHttp,
    Reply,
    ScriptedUpstream,
    error_reply,
    json_reply,
    refused_url,
    stream_reply,
)

FINE = json_reply({"fine": True})
BODY = b'{"model": "m"}'


def ask(
    *headers: tuple[bytes, bytes], body: bytes | AsyncIterator[bytes] | None = BODY, path: str = "/x", query: str = ""
) -> Ask:
    return Ask("POST", path, query, [(b"host", b"gateway.example"), *headers], body)


def backend_at(url: str, name: str = "up", **fields: object) -> Backend:
    return open_backend(
        Upstream.model_validate({"name": name, "kind": "openai", "url": url, **fields}),
        uds=None,
        hides_client_key=False,
    )


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(default=FINE) as upstream:
        yield upstream


@pytest.fixture
async def backend(upstream: ScriptedUpstream) -> AsyncIterator[Backend]:
    backend = backend_at(upstream.url)
    yield backend
    await backend.close()


async def exchange(backend: Backend, asked: Ask) -> tuple[int, Headers, bytes]:
    async with backend.send(asked) as reply:
        return reply.status, reply.headers, await reply.read(2**30)


# --- what goes to a backend, and what comes from it ----------------------------------------------------------------


async def test_what_is_asked_arrives(backend: Backend, upstream: ScriptedUpstream) -> None:
    status, headers, body = await exchange(backend, ask((b"x-own", b"1"), path="/a%2Fb", query="x=%26&y"))
    assert (status, body) == (200, b'{"fine":true}')
    assert (b"content-type", b"application/json") in headers
    arrived = upstream.exchanges[0]
    assert (arrived.method, arrived.path, arrived.body) == ("POST", "/v1/a%2Fb?x=%26&y", BODY)
    assert arrived.headers["x-own"] == "1"


HOPS = [
    (b"connection", b"keep-alive, X-Session , x-other"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-authenticate", b"Basic"),
    (b"proxy-authorization", b"Basic eA=="),
    (b"proxy-connection", b"keep-alive"),
    (b"te", b"trailers"),
    (b"trailer", b"x-sum"),
    (b"upgrade", b"h2c"),
    (b"x-session", b"of this connection"),
    (b"x-other", b"of this connection"),
]


def kept(arrived: Exchange) -> set[str]:
    return {name.lower() for name in arrived.headers}


async def test_headers_of_one_connection_do_not_reach_the_backend(backend: Backend, upstream: ScriptedUpstream) -> None:
    await exchange(backend, ask(*HOPS, (b"expect", b"100-continue"), (b"x-own", b"1")))
    # The client library's own connection has a host, a length and nothing else.
    assert kept(upstream.exchanges[0]) <= {"host", "content-length", "x-own", "connection"}
    assert "x-own" in kept(upstream.exchanges[0])
    assert upstream.exchanges[0].headers["host"] != "gateway.example"
    assert upstream.exchanges[0].headers.get("connection", "").lower() in ("", "keep-alive")


async def test_headers_of_one_connection_do_not_reach_the_client(backend: Backend, upstream: ScriptedUpstream) -> None:
    lines = b"".join(b"%b: %b\r\n" % (name.title(), value) for name, value in HOPS)
    upstream.script(NotHttp(b"HTTP/1.1 200 OK\r\n" + lines + b"X-Own: 1\r\nContent-Length: 2\r\n\r\n{}"))
    _, headers, body = await exchange(backend, ask())
    assert headers == [(b"x-own", b"1"), (b"content-length", b"2")]
    assert body == b"{}"


async def test_repeated_headers_stay_apart(backend: Backend, upstream: ScriptedUpstream) -> None:
    cookies = b"set-cookie: a=1\r\nset-cookie: b=2\r\n"
    upstream.script(NotHttp(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n" + cookies + b"\r\n"))
    _, headers, _ = await exchange(backend, ask((b"x-twice", b"1"), (b"x-twice", b"2")))
    assert [value for name, value in headers if name == b"set-cookie"] == [b"a=1", b"b=2"]
    assert upstream.exchanges[0].headers.getall("x-twice") == ["1", "2"]
    await exchange(backend, ask())
    assert "cookie" not in upstream.exchanges[1].headers


async def test_nothing_is_added_in_the_clients_name(backend: Backend, upstream: ScriptedUpstream) -> None:
    await exchange(backend, ask())
    assert not kept(upstream.exchanges[0]) & {"accept", "accept-encoding", "user-agent", "content-type"}


KEYS = [(b"authorization", b"Bearer mine"), (b"api-key", b"mine"), (b"x-api-key", b"mine")]


@pytest.mark.parametrize("key", KEYS)
async def test_without_a_key_of_its_own_the_backend_gets_the_clients(
    backend: Backend, upstream: ScriptedUpstream, key: tuple[bytes, bytes]
) -> None:
    await exchange(backend, ask(key))
    assert upstream.exchanges[0].headers[key[0].decode()] == key[1].decode()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("own", "sent"), [("theirs", "Bearer theirs"), (None, None)])
async def test_a_key_that_is_for_the_gateway_stays_there(
    upstream: ScriptedUpstream, key: tuple[bytes, bytes], own: str | None, sent: str | None
) -> None:
    backend = Backend("up", upstream.url, Timeouts(), api_key=own, hides_client_key=True)
    await exchange(backend, ask(key))
    await backend.close()
    arrived = upstream.exchanges[0]
    assert arrived.headers.get("authorization") == sent
    assert not any("mine" in value for value in arrived.headers.values())


def test_an_unset_key_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"^upstreams\.up\.api_key_env: the environment variable NOT_THERE "):
        backend_at("http://127.0.0.1:1/v1", api_key_env="NOT_THERE")


def test_a_url_may_end_in_a_slash() -> None:
    assert backend_at("http://h:1/v1/").url == "http://h:1/v1"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_large_body_goes_both_ways(backend: Backend, upstream: ScriptedUpstream, streamed: bool) -> None:
    large = bytes(range(256)) * 40_000
    pieces = [large[at : at + 2**18] for at in range(0, len(large), 2**18)]

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    upstream.script(Reply(pieces if streamed else (large,)))
    _, _, answer = await exchange(backend, ask(body=body() if streamed else large))
    assert answer == large
    assert upstream.exchanges[0].body == large


async def test_an_answer_beyond_the_limit_is_refused(backend: Backend, upstream: ScriptedUpstream) -> None:
    upstream.script(Reply((b"x" * 1000,)))
    async with backend.send(ask()) as reply:
        with pytest.raises(BackendBrokenError, match="more than 999 bytes"):
            await reply.read(999)


async def test_an_answer_comes_as_it_is_written(backend: Backend, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.script(Reply((b"one", gate, b"two")))
    async with backend.send(ask()) as reply:
        chunks = reply.chunks()
        assert await anext(chunks) == b"one"
        gate.set()
        assert [chunk async for chunk in chunks] == [b"two"]


async def test_a_compressed_answer_is_not_unpacked(backend: Backend, upstream: ScriptedUpstream) -> None:
    upstream.script(Reply((b"\x1f\x8b not unpacked",), headers={"content-encoding": "gzip"}))
    _, headers, body = await exchange(backend, ask())
    assert (b"content-encoding", b"gzip") in headers
    assert body == b"\x1f\x8b not unpacked"


async def test_a_redirection_is_the_clients_business(backend: Backend, upstream: ScriptedUpstream) -> None:
    upstream.script(Reply(status=307, headers={"location": "http://elsewhere.example/"}))
    status, headers, _ = await exchange(backend, ask())
    assert (status, dict(headers)[b"location"]) == (307, b"http://elsewhere.example/")


async def test_leaving_early_hangs_up(backend: Backend, upstream: ScriptedUpstream) -> None:
    upstream.script(stream_reply(b"one", end=End.HANG))
    async with backend.send(ask()):
        assert backend.in_flight == 1
    await asyncio.wait_for((await upstream.arrival()).disconnected.wait(), 5)
    assert backend.in_flight == 0


async def test_cancelling_before_the_head_hangs_up(backend: Backend, upstream: ScriptedUpstream) -> None:
    upstream.script(Hang())
    asking = asyncio.create_task(exchange(backend, ask()))
    arrived = await upstream.arrival()
    assert backend.in_flight == 1
    asking.cancel()
    await asyncio.wait_for(arrived.disconnected.wait(), 5)
    assert backend.in_flight == 0


async def test_a_backend_behind_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    async with ScriptedUpstream(default=FINE, uds=path) as upstream:
        setting = Upstream(name="engine", kind="bundled", model="/models/tiny")
        backend = open_backend(setting, uds=path, hides_client_key=False)
        assert backend.models == ("tiny",)
        status, _, _ = await exchange(backend, ask())
        assert (status, upstream.exchanges[0].path) == (200, "/v1/x")
        await backend.close()
    gone = open_backend(setting, uds=path, hides_client_key=False)
    with pytest.raises(NotReadyError, match="engine of upstream engine is being started again"):
        await exchange(gone, ask())
    await gone.close()


async def test_only_a_bundled_engine_is_told_whose_request_it_is(tmp_path: Path) -> None:
    path, spoofed = tmp_path / "engine.sock", [(b"x-hitpath-tenant", b"somebody else")]
    mine = Ask("POST", "/x", "", spoofed, None, namespace="acme/ünit")
    async with ScriptedUpstream(default=FINE, uds=path) as engine, ScriptedUpstream(default=FINE) as foreign:
        local = open_backend(Upstream(name="engine", kind="bundled", model="tiny"), uds=path, hides_client_key=False)
        other = open_backend(Upstream(name="b", kind="openai", url=foreign.url), uds=None, hides_client_key=False)
        for backend in (local, other):
            await exchange(backend, mine)
            await exchange(backend, replace(mine, namespace="acme"))
            await backend.close()
        told = [exchange.headers.get("x-hitpath-tenant") for exchange in engine.exchanges]
        assert len(set(told)) == 2
        assert all(name is not None and name.isalnum() for name in told)
        assert all("x-hitpath-tenant" not in exchange.headers for exchange in foreign.exchanges)


# --- time limits and broken backends -------------------------------------------------------------------------------

HASTY = {"connect": "1s", "first_byte": "60ms", "idle": "60ms"}


async def test_a_head_that_does_not_come(upstream: ScriptedUpstream) -> None:
    upstream.script(Hang())
    backend = backend_at(upstream.url, timeouts=HASTY)
    with pytest.raises(BackendTimeoutError, match=r"upstream up did not send its answer within 0\.06 s"):
        await exchange(backend, ask())
    assert backend.in_flight == 0
    await backend.close()


async def test_a_body_that_falls_silent(upstream: ScriptedUpstream) -> None:
    upstream.script(Reply((b"one",), end=End.HANG))
    backend = backend_at(upstream.url, timeouts={"idle": "60ms"})
    async with backend.send(ask()) as reply:
        with pytest.raises(BackendTimeoutError, match=r"its next bytes within 0\.06 s"):
            await reply.read(100)
    await backend.close()


async def test_an_address_that_does_not_answer() -> None:
    with socket.socket() as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # more than the queue holds, and nobody takes them out: the next one gets no answer
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        backend = backend_at(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeouts={"connect": "60ms"})
        with pytest.raises(BackendUnreachableError, match=r"(?i)timeout"):
            await exchange(backend, ask())
        assert backend.down_until > 0
        await backend.close()


@pytest.mark.parametrize(
    "script",
    [NotHttp(), NotHttp(b""), Reply((b"half",), headers={"content-length": "9"}, end=End.ABORT)],
    ids=["not HTTP", "hangs up", "torn"],
)
async def test_a_backend_that_breaks(backend: Backend, upstream: ScriptedUpstream, script: Reply | NotHttp) -> None:
    # aiohttp sends an idempotent request again when a kept connection turns out closed; a POST it does not.
    upstream.script(script)
    with pytest.raises(BackendBrokenError, match="upstream up broke off before its"):
        await exchange(backend, ask())
    assert backend.in_flight == 0
    assert backend.down_until < 0
    assert len(upstream.exchanges) == 1


async def test_a_refusal_is_one() -> None:
    backend = backend_at(refused_url())
    with pytest.raises(BackendUnreachableError, match=r"^upstream up cannot be reached: "):
        await exchange(backend, ask())
    await backend.close()


# --- the choice ----------------------------------------------------------------------------------------------------


class ManualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def still(
    name: str, *, in_flight: int = 0, down_until: float = float("-inf"), models: tuple[str, ...] = ("*",)
) -> Backend:
    """A backend that is only chosen, never asked."""
    backend = Backend(name, "http://127.0.0.1:1/v1", Timeouts(), models)
    backend.in_flight, backend.down_until = in_flight, down_until
    return backend


def order(router: Router) -> list[str]:
    return [backend.name for backend in router._order(router.backends)]


def test_the_least_busy_is_asked_first_and_among_equals_the_operators_first() -> None:
    assert order(Router([still("a"), still("b"), still("c")])) == ["a", "b", "c"]
    assert order(Router([still("a", in_flight=2), still("b", in_flight=1), still("c", in_flight=1)])) == ["b", "c", "a"]


def test_who_refused_is_asked_last_until_it_has_cooled_down() -> None:
    clock = ManualClock()
    router = Router([still("a", down_until=2.0), still("b", in_flight=9)], clock)
    assert order(router) == ["b", "a"]
    clock.now = 2.0
    assert order(router) == ["a", "b"]


def test_models_have_patterns() -> None:
    router = Router([still("one", models=("qwen-*", "exact")), still("two", models=("qwen-7b",))])
    assert [backend.name for backend in router.pool("qwen-7b")] == ["one", "two"]
    assert [backend.name for backend in router.pool("qwen-70b")] == ["one"]
    assert [backend.name for backend in router.pool("exact")] == ["one"]
    for unknown in ("Qwen-7b", "exact2", "", "qwen"):
        with pytest.raises(UnknownModelError, match=r"served are exact, qwen-\*, qwen-7b") as raised:
            router.pool(unknown)
        assert raised.value.param == "model"


def test_a_backend_can_be_named() -> None:
    router = Router([still("a"), still("b")])
    assert [backend.name for backend in router.named("b")] == ["b"]
    with pytest.raises(BadRequestError, match="'c' is no upstream; known are a, b"):
        router.named("c")


async def test_a_refusal_is_passed_over_and_remembered(upstream: ScriptedUpstream) -> None:
    dead, alive = backend_at(refused_url(), "dead"), backend_at(upstream.url, "alive")
    router = Router([dead, alive])
    for _ in range(2):
        async with router.send(router.pool("m"), ask()) as (backend, reply):
            assert backend is alive
            assert await reply.read(100) == b'{"fine":true}'
    assert order(router) == ["alive", "dead"]
    assert (dead.in_flight, alive.in_flight) == (0, 0)
    await router.close()


async def test_when_all_refuse_the_last_refusal_is_told() -> None:
    router = Router([backend_at(refused_url(), "a"), backend_at(refused_url(), "b")])
    with pytest.raises(BackendUnreachableError, match="upstream b cannot be reached"):
        async with router.send(router.backends, ask()):
            pass
    await router.close()


@pytest.mark.parametrize("script", [error_reply(503), NotHttp(), Hang()], ids=["503", "broken", "hangs"])
async def test_what_was_sent_is_not_sent_again_elsewhere(
    upstream: ScriptedUpstream, script: Reply | NotHttp | Hang
) -> None:
    """A generation costs money: only a backend that took nothing may be replaced by another."""
    async with ScriptedUpstream() as other:
        upstream.script(script)
        first, second = backend_at(upstream.url, "first", timeouts=HASTY), backend_at(other.url, "second")
        router = Router([first, second])
        with suppress(BackendBrokenError, BackendTimeoutError):
            async with router.send(router.backends, ask()) as (_, reply):
                assert reply.status == 503
        assert other.exchanges == []
        await router.close()


async def test_calls_spread_over_equal_backends(upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    async with ScriptedUpstream() as other:
        for backend in (upstream, other):
            backend.default = Reply((b"{}",), gate=gate)
        router = Router([backend_at(upstream.url, "a"), backend_at(other.url, "b")])

        async def one() -> str:
            async with router.send(router.backends, ask()) as (backend, reply):
                await reply.read(10)
                return backend.name

        asking = [asyncio.create_task(one()) for _ in range(10)]
        await upstream.arrival(5)
        await other.arrival(5)
        gate.set()
        assert sorted(await asyncio.gather(*asking)) == ["a"] * 5 + ["b"] * 5
        await router.close()


async def test_an_error_of_the_reader_ends_the_exchange(upstream: ScriptedUpstream) -> None:
    upstream.script(stream_reply(b"one", end=End.HANG))
    router = Router([backend_at(upstream.url)])
    with pytest.raises(ZeroDivisionError):
        async with router.send(router.backends, ask()):
            raise ZeroDivisionError
    await asyncio.wait_for((await upstream.arrival()).disconnected.wait(), 5)
    assert router.backends[0].in_flight == 0
    await router.close()
