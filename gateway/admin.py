"""The operators' doors: `/healthz`, `/readyz`, `/metrics`, and `/admin/*` behind a key of its own."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import orjson

from cachestore import Filter, Store
from gateway.errors import AuthenticationError, BadRequestError, MethodError, UnknownPathError
from gateway.http import Inbox, Request
from gateway.metrics import Metrics, stats_document
from gateway.responder import JSON, Responder
from gateway.tenants import credential

_TEXT = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_MAX_BODY = 2**20
_PAGE = 100
_MAX_PAGE = 1000


class HealthDoor:
    """`/healthz` says that the process lives, `/readyz` whether it can answer calls."""

    def __init__(self, ready: Callable[[], dict[str, bool]]) -> None:
        """`ready` names the parts and whether each is ready."""
        self._ready = ready

    async def __call__(self, request: Request, respond: Responder) -> None:
        """Answer 200 or 503."""
        parts = self._ready() if request.path == "/readyz" else {}
        status = 200 if all(parts.values()) else 503
        await respond.whole(status, [JSON], orjson.dumps({"status": "ok" if status == 200 else "not ready", **parts}))


class MetricsDoor:
    """`/metrics` in Prometheus' text format."""

    def __init__(self, metrics: Metrics) -> None:
        """Serve the registry of these metrics."""
        self._metrics = metrics

    async def __call__(self, request: Request, respond: Responder) -> None:
        """Answer with all figures."""
        await respond.whole(200, [_TEXT], self._metrics.text())


class AdminDoor:
    """`/admin/stats`, `/admin/purge`, `/admin/entries` and `/admin/entries/ID`."""

    def __init__(
        self, store: Store, key: str | None, categories: Callable[[], dict[str, dict[str, Any]]] = dict
    ) -> None:
        """Without a key there is nothing here; `categories` gives what was learnt of each."""
        self._store = store
        self._categories = categories
        self._key = key

    async def __call__(self, request: Request, respond: Responder) -> None:
        """Serve an operator. Raises UnknownPathError, AuthenticationError, BadRequestError."""
        if self._key is None:
            raise UnknownPathError("the admin endpoints are off; set the variable that admin.key_env names")
        if not hmac.compare_digest(credential(request.headers).encode(), self._key.encode()):
            raise AuthenticationError("the admin endpoints need the admin key as bearer token")
        body = await Inbox(request.receive).read(request.headers, _MAX_BODY)
        document = await self._answer(request.method, request.path.removeprefix("/admin/"), body)
        await respond.whole(200, [JSON], orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS))

    async def _answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        match method, path.split("/"):
            case "GET", ["stats"]:
                return stats_document(self._store.stats()) | {"categories": self._categories()}
            case "POST", ["purge"]:
                return await self._purge(body)
            case "POST", ["entries"]:
                return await self._entries(body)
            case "POST", ["check"]:
                return {"problems": await self._store.check()}
            case _, ["stats" | "purge" | "entries" | "check"]:
                raise MethodError(f"{method} is not allowed here")
        raise UnknownPathError(f"there is nothing at /admin/{path}")

    async def _purge(self, body: bytes) -> dict[str, Any]:
        asked = _document(body, {*_FILTER, "dry_run"})
        dry_run = asked.pop("dry_run", False)
        if not isinstance(dry_run, bool):
            raise BadRequestError("dry_run must be true or false", param="dry_run")
        purged = await self._store.purge(_filter(asked), dry_run=dry_run)
        return {"purged": len(purged), "dry_run": dry_run, "ids": purged[:_MAX_PAGE]}

    async def _entries(self, body: bytes) -> dict[str, Any]:
        asked = _document(body, {*_FILTER, "limit", "offset", "bodies"})
        bodies = asked.pop("bodies", False) is True
        limit, offset = asked.pop("limit", _PAGE), asked.pop("offset", 0)
        for name, value, top in (("limit", limit, _MAX_PAGE), ("offset", offset, 2**62)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= top:
                raise BadRequestError(f"{name} must be a whole number from 0 to {top}", param=name)
        rows = await self._store.entries(_filter(asked), limit=limit, offset=offset, bodies=bodies)
        return {"entries": [_readable(asdict(row)) for row in rows]}


_FILTER = ("category", "namespace", "model", "contains", "ids")


def _document(body: bytes, allowed: set[str]) -> dict[str, Any]:
    try:
        document = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRequestError("the body must be a JSON object")
    if unknown := sorted(set(document) - allowed):
        raise BadRequestError(f"{unknown[0]!r} is unknown; valid are {', '.join(sorted(allowed))}", param=unknown[0])
    return document


def _filter(asked: dict[str, Any]) -> Filter:
    ids = asked.pop("ids", [])
    if not isinstance(ids, list) or not all(isinstance(item, int) for item in ids):
        raise BadRequestError("ids must be a list of whole numbers", param="ids")
    for name, value in asked.items():
        if value is not None and not isinstance(value, str):
            raise BadRequestError(f"{name} must be a string", param=name)
    return Filter(**asked, ids=tuple(ids))


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """Turn bytes into what JSON can carry: digests as hex, bodies as the JSON that they are."""
    for name, value in row.items():
        if isinstance(value, bytes):
            row[name] = orjson.Fragment(value) if name == "body" and value else value.hex()
    return row
