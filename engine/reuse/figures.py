"""What `/metrics` shows of chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cachestore.kv import Lost, Refusal, Stats, Tier
from engine.reuse.gate import GateFigures

SHOWN = {Tier.MEMORY: "memory", Tier.DISK: "disk", Tier.REMOTE: "redis"}
"""Tiers as clients and operators are told them."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the library's books say at one moment; the counts of what happened only ever rise."""

    store: Stats
    gate: GateFigures
    hot_chunks: int
    hot_bytes: int
    hot_hits: int
    hot_read: int
    """Bytes of those."""
    prompts: int
    """With chunks placed."""
    placed: int
    """Chunks of those."""
    kept: int
    """Tokens of those that were not computed …"""
    recomputed: int
    """… and that were."""
    refined: int
    known: int
    waiting: int
    """Background jobs."""
    check_failures: int


def reuse_metrics(now: Figures) -> Iterator[Metric]:
    """Every figure of chunks."""
    yield from _tiers(now)
    yield from _reuse(now)
    yield from _books(now)


def _tiers(now: Figures) -> Iterator[Metric]:
    store, prefix = now.store, "hitpath_engine_kv"
    hits = {"pool": now.hot_hits, **{name: store.hits.get(tier, 0) for tier, name in SHOWN.items()}}
    read = {"pool": now.hot_read, **{name: store.read.get(tier, 0) for tier, name in SHOWN.items()}}
    seconds = {name: store.seconds.get(tier, 0.0) for tier, name in SHOWN.items()}
    yield _by("tier", f"{prefix}_hits", "Chunks found, by tier.", hits)
    yield _by("tier", f"{prefix}_read_bytes", "Bytes of those.", read)
    yield _by("tier", f"{prefix}_read_seconds", "Seconds waited for those.", seconds)
    lost = {str(reason): store.lost.get(reason, 0) for reason in Lost}
    yield _by("reason", f"{prefix}_lost", "Chunks asked for and not had.", lost)
    refused = {str(reason): store.refused.get(reason, 0) for reason in Refusal}
    yield _by("reason", f"{prefix}_refused", "Chunks not taken for storing.", refused)
    yield CounterMetricFamily(f"{prefix}_stored", "Chunks stored.", store.stored)
    yield CounterMetricFamily(f"{prefix}_unwritten", "Chunks that could not be written.", store.unwritten)
    yield CounterMetricFamily(f"{prefix}_evicted", "Chunks given up for want of room.", store.evicted)
    yield GaugeMetricFamily(f"{prefix}_chunks", "Chunks stored now.", store.chunks)
    yield GaugeMetricFamily(f"{prefix}_bytes", "Bytes of those.", store.bytes)
    yield GaugeMetricFamily(f"{prefix}_writing_bytes", "Bytes not written yet.", store.writing)
    yield GaugeMetricFamily(f"{prefix}_waiting_orders", "Chunks still to be encoded or dropped.", store.orders)
    yield GaugeMetricFamily(f"{prefix}_pool_chunks", "Decoded chunks on the device.", now.hot_chunks)
    yield GaugeMetricFamily(f"{prefix}_pool_bytes", "Bytes of those.", now.hot_bytes)
    yield GaugeMetricFamily(f"{prefix}_known_texts", "Texts found wherever they stand.", now.known)


def _reuse(now: Figures) -> Iterator[Metric]:
    prefix = "hitpath_engine_reuse"
    yield CounterMetricFamily(f"{prefix}_prompts", "Prompts computed with chunks.", now.prompts)
    yield CounterMetricFamily(f"{prefix}_chunks", "Chunks placed in them.", now.placed)
    kept = {"kept": now.kept, "recomputed": now.recomputed}
    yield _by("kind", f"{prefix}_tokens", "Tokens of those, not computed and computed again.", kept)
    yield CounterMetricFamily(f"{prefix}_refined", "Chunks computed better when there was time.", now.refined)
    yield GaugeMetricFamily(f"{prefix}_background_jobs", "Jobs that wait until nothing runs.", now.waiting)


def _books(now: Figures) -> Iterator[Metric]:
    prefix, gate = "hitpath_engine_reuse", now.gate
    yield GaugeMetricFamily(
        f"{prefix}_on", "Whether chunks are reused: checks find no more loss than stated.", gate.open
    )
    yield CounterMetricFamily(f"{prefix}_checks", "Prompts compared with computing everything.", gate.checks)
    yield CounterMetricFamily(f"{prefix}_switched_off", "Times that checks switched reuse off.", gate.closings)
    yield GaugeMetricFamily(f"{prefix}_check_kl", "Nats, mean of the checks since the last switching.", gate.kl.mean)
    disagree = "Share of first tokens that differ, since the last switching."
    yield GaugeMetricFamily(f"{prefix}_check_disagreement", disagree, gate.disagreement.mean)
    yield CounterMetricFamily(f"{prefix}_book_failures", "Times the chunks' books were wrong.", now.check_failures)


def _by(label: str, name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
