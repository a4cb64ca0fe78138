"""Everything around trust, opened together: what was learnt, where it is kept, who checks and who corrects."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from cachestore import Store
from gateway.checks import CheckRules, Checks
from gateway.comparing import Comparer
from gateway.corrections import Corrections
from gateway.embedding import Embedder
from gateway.judge.load import FOLDER, HEAD
from gateway.judge.pairjudge import PairJudge
from gateway.load import Capacity, Loads
from gateway.metrics import Metrics
from gateway.nearmisses import NearMisses
from gateway.settings import Cache, Settings
from gateway.trust import Trust, TrustRules
from gateway.trustmetrics import TrustMetrics
from gateway.truststate import TrustFile
from gateway.upstream import Router
from policies.category import CategoryTable
from policies.economics import EconomicsRules
from policies.judge import Judge
from policies.load import LoadRules


@dataclass(frozen=True, slots=True)
class Trusting:
    """What the pipeline needs of it."""

    trust: Trust
    checks: Checks
    corrections: Corrections


def make_trust(settings: Settings, judge: Judge, table: CategoryTable) -> Trust:
    """Return what nothing has been learnt of yet."""
    rules = trust_rules(settings.cache)
    if not isinstance(judge, PairJudge):
        # A similarity is no probability: a rung above one may be where nothing ever is.
        rules = replace(rules, guard=False)
    return Trust(rules, table.policies, judge.point, judge=_identity(judge))


@asynccontextmanager
async def open_trusting(
    settings: Settings,
    trust: Trust,
    *,
    embedder: Embedder,
    judge: Judge,
    store: Store,
    router: Router,
    loads: Loads,
    metrics: Metrics,
) -> AsyncIterator[Trusting]:
    """Take up what was learnt before, and keep it when the block ends."""
    budgets, near = settings.cache.budgets, settings.cache.near_misses
    counted = TrustMetrics(metrics.registry)
    counted.watch(trust.stats, loads.levels)
    async with AsyncExitStack() as stack:
        file = await TrustFile.open(settings.data_dir, trust)
        stack.push_async_callback(file.close)
        near_misses = NearMisses(settings.data_dir, near.keep, near.size)
        stack.push_async_callback(near_misses.close)
        comparer = Comparer(embedder, judge, router, budgets.judge_model)
        rules = CheckRules(budgets.concurrent, budgets.waiting, budgets.busy_above)
        prices = {item.name: item.price for item in settings.effective_upstreams() if item.price is not None}
        checks = Checks(trust, comparer, router, loads, store, near_misses, counted, rules, prices)
        stack.push_async_callback(checks.close)
        yield Trusting(trust, checks, Corrections(store, trust, file, counted))


def open_loads(settings: Settings) -> Loads:
    """Return the loads of the upstreams, all idle."""
    load = settings.cache.load
    capacities = {
        item.name: Capacity(
            item.slots,
            LoadRules(
                objective=item.objective, rise=load.rise, fall=load.fall, engage=load.engage, release=load.release
            ),
        )
        for item in settings.effective_upstreams()
    }
    return Loads(capacities, load.stretch)


def trust_rules(cache: Cache) -> TrustRules:
    """Return the settings as the policies know them."""
    budgets, economics = cache.budgets, cache.economics
    return TrustRules(
        keep=budgets.keep,
        start=budgets.start,
        risk=budgets.risk,
        horizon=budgets.horizon,
        shadow_min=budgets.checked_min,
        shadow_max=budgets.most,
        refresh_within=budgets.refresh_within,
        skip=economics.skip,
        economics=EconomicsRules(
            memory=2 * economics.evidence,
            evidence=economics.evidence,
            pause=economics.pause,
            longest_pause=economics.longest_pause,
        ),
    )


def _identity(judge: Judge) -> str:
    """Name what gives the probabilities: those of another judge mean something else."""
    if not isinstance(judge, PairJudge):
        return "threshold"
    return f"pair-{hashlib.sha256((FOLDER / HEAD).read_bytes()).hexdigest()[:16]}"
