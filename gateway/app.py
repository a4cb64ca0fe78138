"""Builds the gateway from its settings, opens it, closes it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Route

from cachestore import Store, StoreOptions
from gateway.admin import AdminDoor, HealthDoor, MetricsDoor
from gateway.embedding import Embedder
from gateway.embedding.local import LocalEmbedder
from gateway.embedding.remote import RemoteEmbedder
from gateway.errors import UnknownModelError, UnknownPathError
from gateway.feedback import FeedbackDoor
from gateway.http import CachedDoor, Door, Guard, ModelsDoor, PassThroughDoor, Request
from gateway.judge import JudgeError
from gateway.judge.load import FOLDER as JUDGE_FOLDER
from gateway.judge.load import load as load_judge
from gateway.judge.pairjudge import PairJudge
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.responder import Responder
from gateway.semantic import SemanticRoom
from gateway.settings import LocalEmbedder as LocalEmbedderSettings
from gateway.settings import NoEmbedder, OpenaiEmbedder, Settings, SettingsError, secret
from gateway.supervise import Engine
from gateway.tenants import Tenants
from gateway.trust import Trust
from gateway.trusting import make_trust, open_loads, open_trusting
from gateway.upstream import Router, open_backend
from policies.category import CategoryTable
from policies.classifier import CategoryHead
from policies.eviction import ValuePerByte
from policies.judge import Judge, ThresholdJudge
from policies.quota import Quota
from policies.wary import WaryJudge

log = logging.getLogger(__name__)

_CACHED = {
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/responses": "responses",
}
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@dataclass(frozen=True, slots=True)
class Gateway:
    """An open gateway."""

    app: Starlette
    store: Store
    models: tuple[str, ...]


@asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Open the store, the embedder and the backends; close them in the opposite order.

    Raises SettingsError, StoreError, EmbedderError, JudgeError, EngineFailedError: each says what is wrong and what
    would be right.
    """
    async with AsyncExitStack() as stack:
        tenants = Tenants(settings.tenants, shared=settings.cache.shared)
        bundled = [item for item in settings.effective_upstreams() if item.kind == "bundled"]
        engines = [Engine(item.name, item.model, flags=item.flags) for item in bundled]
        router = _router(settings, {engine.name: engine for engine in engines})
        stack.push_async_callback(router.close)
        _check_examples(settings, router)
        _check_judge_model(settings, router)
        judge = await open_judge(settings)
        stack.push_async_callback(judge.close)
        table = settings.cache.table(judged=isinstance(judge, PairJudge))
        for engine in engines:
            stack.push_async_callback(engine.stop)
        starting = asyncio.gather(*(engine.start() for engine in engines))
        (embedder, store), _ = await asyncio.gather(_open_cache(settings, table, stack), starting)
        metrics, loads, trusting, trust = Metrics(), open_loads(settings), None, None
        if embedder is not None:
            trust = make_trust(settings, judge, table)
            opened = open_trusting(
                settings,
                trust,
                embedder=embedder,
                judge=judge,
                store=store,
                router=router,
                loads=loads,
                metrics=metrics,
            )
            trusting = await stack.enter_async_context(opened)
        pipeline = Pipeline(
            store=store,
            semantic=semantic_room(embedder, store, judge, table, trust),
            router=router,
            table=table,
            metrics=metrics,
            max_answer=settings.cache.max_answer,
            stale_grace=settings.cache.stale_grace,
            sharing=settings.cache.sharing.rules() if settings.cache.shared else None,
            trusting=trusting,
            loads=loads,
        )
        stack.push_async_callback(pipeline.close)
        health = HealthDoor(lambda: {"store": store.loaded.is_set()} | {item.name: item.ready for item in engines})
        admin = AdminDoor(store, _admin_key(settings), trust.stats if trust is not None else dict)
        feedback = FeedbackDoor(trusting.corrections, tenants) if trusting is not None else None
        routes = _routes(settings, pipeline, router, tenants, metrics, health, admin, feedback)
        models = tuple(pattern for backend in router.backends for pattern in backend.models)
        yield Gateway(Starlette(routes=routes), store, models)


async def _open_cache(settings: Settings, table: CategoryTable, stack: AsyncExitStack) -> tuple[Embedder | None, Store]:
    embedder = await open_embedder(settings, table)
    if embedder is not None:
        stack.push_async_callback(embedder.close)
    store = await open_store(settings, table, embedder)
    stack.push_async_callback(store.close)
    return embedder, store


async def open_embedder(settings: Settings, table: CategoryTable) -> Embedder | None:
    """Open the embedder of the settings; None when nothing is compared by meaning."""
    chosen = settings.cache.embedder
    if isinstance(chosen, NoEmbedder) or not table.compares:
        return None
    if isinstance(chosen, LocalEmbedderSettings):
        return await LocalEmbedder.open(settings.data_dir, threads=chosen.threads)
    assert isinstance(chosen, OpenaiEmbedder)
    key = secret(chosen.api_key_env, key="cache.embedder.api_key_env")
    return await RemoteEmbedder.open(chosen.url, chosen.model, api_key=key, timeout=chosen.timeout)


async def open_store(settings: Settings, table: CategoryTable, embedder: Embedder | None) -> Store:
    """Open the data directory's store within its budgets."""
    cache = settings.cache
    options = StoreOptions(
        memory_budget=cache.memory(),
        disk_budget=cache.disk_budget,
        stale_grace=cache.stale_grace,
        quotas={name: Quota(policy.quota_min, policy.quota_max) for name, policy in table.policies.items()},
        max_body=cache.max_answer,
        embedder="" if embedder is None else embedder.identity,
    )
    return await Store.open(settings.data_dir, options, eviction=ValuePerByte())


async def open_judge(settings: Settings, folder: Path = JUDGE_FOLDER) -> Judge:
    """Open the judge of the settings. Raises JudgeError when its files cannot be used and may not be done without."""
    cache = settings.cache
    if cache.judge.kind == "threshold" or isinstance(cache.embedder, NoEmbedder) or not cache.table().compares:
        return ThresholdJudge()
    try:
        model, head = await asyncio.to_thread(load_judge, folder)
    except JudgeError as error:
        if cache.judge.on_missing == "stop":
            raise
        log.warning("%s; similarity alone decides, at the thresholds for that", error)
        return ThresholdJudge()
    return PairJudge(model, head, cosine=isinstance(cache.embedder, LocalEmbedderSettings))


def semantic_room(
    embedder: Embedder | None, store: Store, judge: Judge, table: CategoryTable, trust: Trust | None = None
) -> SemanticRoom | None:
    """Return the room where calls are compared by meaning, with the classifier if it knows this embedder."""
    if embedder is None:
        return None
    head = CategoryHead.load()
    if not head.fits(embedder.identity):
        log.warning("the classifier was trained for %s: calls are not classified", head.embedder)
        return SemanticRoom(embedder, None, store, WaryJudge(judge), table, trust)
    return SemanticRoom(embedder, head, store, WaryJudge(judge), table, trust)


def _check_examples(settings: Settings, router: Router) -> None:
    """See that the models that get examples are served. Raises SettingsError."""
    for name, rules in {"default": settings.cache.default, **settings.cache.categories}.items():
        if rules.example is None:
            continue
        try:
            router.pool(rules.example.model)
        except UnknownModelError as error:
            where = "default" if rules is settings.cache.default else f"categories.{name}"
            raise SettingsError(f"cache.{where}.example.model: {error}") from error


def _check_judge_model(settings: Settings, router: Router) -> None:
    """See that the model that compares answers is served. Raises SettingsError."""
    model = settings.cache.budgets.judge_model
    try:
        if model is not None:
            router.pool(model)
    except UnknownModelError as error:
        raise SettingsError(f"cache.budgets.judge_model: {error}") from error


def _router(settings: Settings, engines: dict[str, Engine]) -> Router:
    return Router(
        [
            open_backend(
                upstream,
                uds=engines[upstream.name].uds if upstream.name in engines else None,
                hides_client_key=bool(settings.tenants),
            )
            for upstream in settings.effective_upstreams()
        ]
    )


def _admin_key(settings: Settings) -> str | None:
    return os.environ.get(settings.admin.key_env) or None


def _routes(
    settings: Settings,
    pipeline: Pipeline,
    router: Router,
    tenants: Tenants,
    metrics: Metrics,
    health: HealthDoor,
    admin: AdminDoor,
    feedback: FeedbackDoor | None,
) -> list[Route]:
    untouched = PassThroughDoor(router, tenants)
    cached = {
        f"/v1{path}": CachedDoor(endpoint, path, pipeline, tenants, untouched, settings.server.max_body)
        for path, endpoint in _CACHED.items()
    }
    doors: dict[str, Door] = {
        **cached,
        "/v1/models": ModelsDoor(router, tenants),
        "/v1/hitpath/feedback": _nothing_here if feedback is None else feedback,
        "/v1/{path:path}": untouched,
        "/healthz": health,
        "/readyz": health,
        "/metrics": MetricsDoor(metrics),
        "/admin/{path:path}": admin,
        "/{path:path}": _nothing_here,
    }
    return [Route(path, Guard(door, metrics), methods=_METHODS) for path, door in doors.items()]


async def _nothing_here(request: Request, respond: Responder) -> None:
    raise UnknownPathError(f"there is nothing at {request.path}; the API lies below /v1/")
