"""Operators' doors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import ScriptedUpstream
from tests.gateway.harness import ADMIN_KEY, Answer, Client, serving, settings_for

KEY = {"authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
async def admin(upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    monkeypatch.setenv("HITPATH_ADMIN_KEY", ADMIN_KEY)
    async with serving(settings_for(tmp_path, upstream)) as client:
        yield client


async def ask(client: Client, path: str, **document: Any) -> Answer:
    return await client.post(f"/admin/{path}", document, **KEY)


async def test_the_key_is_needed(admin: Client) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert (await admin.ask("GET", "/admin/stats", headers=headers)).status == 401
    assert (await admin.ask("GET", "/admin/stats", headers=KEY)).status == 200


async def test_stats_count(admin: Client) -> None:
    await admin.chat("hello")
    await admin.chat("hello")
    stats = (await admin.ask("GET", "/admin/stats", headers=KEY)).json()
    assert (stats["entries"], stats["hits"], stats["stored"]) == (1, 1, 1)


async def test_purging_forgets_at_once(admin: Client) -> None:
    await admin.chat("alpha", x_hitpath_category="code")
    await admin.chat("beta", x_hitpath_category="travel")
    assert (await ask(admin, "purge", category="code", dry_run=True)).json()["purged"] == 1
    assert "hit" in (await admin.chat("alpha")).cache
    assert (await ask(admin, "purge", category="code")).json() == {"purged": 1, "dry_run": False, "ids": [1]}
    assert "fwd=miss" in (await admin.chat("alpha")).cache
    assert "hit" in (await admin.chat("beta")).cache


async def test_purging_by_text_tenant_model_and_id(admin: Client) -> None:
    await admin.chat("the quick brown fox", x_hitpath_namespace="a")
    await admin.chat("the lazy dog", fields={"model": "n"})
    assert (await ask(admin, "purge", contains="QUICK", dry_run=True)).json()["purged"] == 1
    assert (await ask(admin, "purge", namespace="anonymous", dry_run=True)).json()["purged"] == 2
    assert (await ask(admin, "purge", namespace="anonymous/a", dry_run=True)).json()["purged"] == 1
    assert (await ask(admin, "purge", namespace="anon", dry_run=True)).json()["purged"] == 0
    assert (await ask(admin, "purge", model="n", dry_run=True)).json()["purged"] == 1
    assert (await ask(admin, "purge", ids=[1, 99])).json()["purged"] == 1
    assert (await ask(admin, "purge")).json()["purged"] == 1


async def test_entries_are_listed_and_shown(admin: Client) -> None:
    for number in range(5):
        await admin.chat(f"question {number}")
    listed = (await ask(admin, "entries", limit=2, offset=1)).json()["entries"]
    assert [entry["text"] for entry in listed] == ["question 3", "question 2"]
    assert len(listed[0]["key"]) == 32
    shown = (await ask(admin, "entries", ids=[listed[0]["id"]], bodies=True)).json()["entries"]
    assert shown[0]["body"]["object"] == "chat.completion"
    assert (await ask(admin, "check")).json() == {"problems": []}


@pytest.mark.parametrize(
    ("path", "document", "param"),
    [
        ("purge", {"categories": "code"}, "categories"),
        ("purge", {"category": 5}, "category"),
        ("purge", {"ids": "1"}, "ids"),
        ("purge", {"dry_run": "yes"}, "dry_run"),
        ("entries", {"limit": -1}, "limit"),
        ("entries", {"limit": True}, "limit"),
        ("entries", {"limit": 5000}, "limit"),
        ("entries", {"offset": "x"}, "offset"),
    ],
)
async def test_a_wrong_field_is_named(admin: Client, path: str, document: dict[str, Any], param: str) -> None:
    answer = await ask(admin, path, **document)
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)


async def test_wrong_paths_and_methods(admin: Client) -> None:
    assert (await admin.ask("GET", "/admin/nothing", headers=KEY)).status == 404
    assert (await admin.ask("GET", "/admin/purge", headers=KEY)).status == 405
    assert (await admin.ask("POST", "/admin/purge", headers=KEY, data=b"{")).status == 400


async def test_health_readiness_and_metrics(admin: Client) -> None:
    await admin.chat("hello")
    await admin.chat("hello")
    await admin.post("/v1/chat/completions", b"{")
    assert (await admin.ask("GET", "/healthz")).json() == {"status": "ok"}
    assert (await admin.ask("GET", "/readyz")).json() == {"status": "ok", "store": True}
    text = (await admin.ask("GET", "/metrics")).body.decode()
    assert 'hitpath_requests_total{endpoint="chat",outcome="miss"} 1.0' in text
    assert 'hitpath_requests_total{endpoint="chat",outcome="hit_exact"} 1.0' in text
    assert 'hitpath_errors_total{code="invalid_request"} 1.0' in text
    assert 'hitpath_store_entries{of=""} 1.0' in text
    saved = next(
        line for line in text.splitlines() if line.startswith('hitpath_saved_seconds_total{category="general"}')
    )
    assert float(saved.split()[1]) > 0
    assert 'hitpath_upstream_seconds_count{upstream="up0"} 1.0' in text
