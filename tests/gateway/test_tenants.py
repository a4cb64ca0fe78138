"""Tenants: keys, namespaces, rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import AuthenticationError, RateLimitError
from gateway.settings import SettingsError, Tenant
from gateway.tenants import Tenants, credential
from tests.fakes import ScriptedUpstream
from tests.gateway.harness import serving, settings_for

TENANTS = [{"name": "acme", "key_env": "ACME_KEY"}, {"name": "beta", "key_env": "BETA_KEY"}]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_KEY", "acme-secret")
    monkeypatch.setenv("BETA_KEY", "beta-secret")


async def test_only_tenants_keys_open_the_gateway(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, upstream, tenants=TENANTS)) as client:
        for key in ("", "Bearer nope", "Bearer "):
            answer = await client.chat("hello", authorization=key)
            assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/v1/models", "/v1/files"):
            assert (await client.ask("GET", path)).status == 401
        assert (await client.ask("GET", "/healthz")).status == 200
        assert (await client.chat("hello", authorization="Bearer acme-secret")).status == 200
        assert len(upstream.exchanges) == 1


async def test_tenants_share_nothing_and_their_keys_stay_here(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with serving(settings_for(tmp_path, upstream, tenants=TENANTS)) as client:
        await client.chat("hello", authorization="Bearer acme-secret")
        assert "fwd=miss" in (await client.chat("hello", authorization="Bearer beta-secret")).cache
        assert "hit" in (await client.chat("hello", authorization="Bearer acme-secret")).cache
        assert all("authorization" not in exchange.headers for exchange in upstream.exchanges)


async def test_the_backends_own_key_is_used(
    upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL_KEY", "pool-secret")
    upstreams = [{"name": "pool", "kind": "vllm", "url": upstream.url, "api_key_env": "POOL_KEY"}]
    async with serving(settings_for(tmp_path, upstreams=upstreams, tenants=TENANTS)) as client:
        await client.chat("hello", authorization="Bearer acme-secret")
        assert upstream.exchanges[0].headers["authorization"] == "Bearer pool-secret"


def test_a_rate_is_kept() -> None:
    now = 0.0
    tenants = Tenants(
        [Tenant(name="acme", key_env="ACME_KEY", rate_limit="2/s")],  # type: ignore[arg-type]
        shared=False,
        clock=lambda: now,
    )
    tenants.identify("acme-secret")
    tenants.identify("acme-secret")
    with pytest.raises(RateLimitError) as raised:
        tenants.identify("acme-secret")
    assert dict(raised.value.headers())[b"retry-after"] == b"1"
    now = 0.6
    tenants.identify("acme-secret")


def test_an_unset_key_stops_the_start() -> None:
    with pytest.raises(SettingsError, match=r"tenants\.gamma\.key_env: the environment variable GAMMA_KEY is not set"):
        Tenants([Tenant(name="gamma", key_env="GAMMA_KEY")], shared=False)


def test_without_tenants_a_token_is_a_namespace() -> None:
    tenants = Tenants([], shared=False)
    one, other = tenants.identify("one").namespace, tenants.identify("two").namespace
    assert one != other
    assert "one" not in one
    assert tenants.identify("").namespace == "anonymous"


def test_who_shares_has_a_namespace_of_its_own_and_a_common_one() -> None:
    tenants = Tenants([], shared=True)
    one, other = tenants.identify("one"), tenants.identify("")
    assert one.namespace != other.namespace
    assert one.shared == other.shared == "shared"
    assert Tenants([], shared=False).identify("one").shared is None


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, ""),
        ({"authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"authorization": "Basic eDp5"}, "Basic eDp5"),
        ({"api-key": "k"}, "k"),
        ({"x-api-key": "k"}, "k"),
    ],
)
def test_where_a_key_may_stand(headers: dict[str, str], expected: str) -> None:
    assert credential(headers) == expected


def test_a_wrong_key_says_what_is_needed() -> None:
    with pytest.raises(AuthenticationError, match="bearer token"):
        Tenants([Tenant(name="acme", key_env="ACME_KEY")], shared=False).identify("nope")
