"""What `/metrics` says (Prometheus), counted without touching a lock on the hot path more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cachestore import StoreStats
from policies.reasons import Bypass, Miss, NotStored

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The gateway's counters; labels are endpoint, outcome, category, reason and upstream, all from closed sets."""

    def __init__(self) -> None:
        """Start at zero in a registry of its own."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "hitpath_requests", "Calls on cached paths by outcome.", ["endpoint", "outcome"], registry=self.registry
        )
        self._categories = Counter(
            "hitpath_category_hits", "Hits by category.", ["category", "kind"], registry=self.registry
        )
        self._misses = Counter(
            "hitpath_misses", "Calls not answered from the cache.", ["reason"], registry=self.registry
        )
        self._not_stored = Counter("hitpath_not_stored", "Answers not kept.", ["reason"], registry=self.registry)
        self._personal = Counter(
            "hitpath_personal_data", "Questions or answers with personal data.", ["kind"], registry=self.registry
        )
        self._shared = Counter(
            "hitpath_shared", "Answers offered to the shared scope.", ["outcome"], registry=self.registry
        )
        self._refreshes = Counter(
            "hitpath_refreshes", "Stale answers fetched anew in the background.", ["outcome"], registry=self.registry
        )
        self._errors = Counter("hitpath_errors", "Errors of the gateway's own.", ["code"], registry=self.registry)
        self._saved = Counter(
            "hitpath_saved_seconds", "Generation time that hits saved.", ["category"], registry=self.registry
        )
        self._upstream = Histogram(
            "hitpath_upstream_seconds",
            "From asking a backend to the end of its answer.",
            ["upstream"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.disconnects = Counter(
            "hitpath_client_disconnects", "Clients gone before their answer.", registry=self.registry
        )
        self._in_flight = Gauge("hitpath_flights", "Generations under way.", registry=self.registry)
        self._hits: dict[tuple[str, str, str], Callable[[float], None]] = {}

    def hit(self, endpoint: str, kind: str, category: str, saved: float) -> None:
        """Count a hit; `kind` is exact, semantic or stale, `saved` the seconds of generation it stands for."""
        count = self._hits.get((endpoint, kind, category))
        if count is None:
            by_endpoint = self._requests.labels(endpoint, f"hit_{kind}")
            by_category = self._categories.labels(category, kind)
            seconds = self._saved.labels(category)

            def count(saved: float) -> None:
                by_endpoint.inc()
                by_category.inc()
                seconds.inc(saved)

            self._hits[endpoint, kind, category] = count
        count(saved)

    def miss(self, endpoint: str, reason: Miss | Bypass, *, collapsed: bool) -> None:
        """Count a call that went on to a backend, or joined one that had."""
        kind = "bypass" if isinstance(reason, Bypass) else "collapsed" if collapsed else "miss"
        self._requests.labels(endpoint, kind).inc()
        self._misses.labels(reason).inc()

    def not_stored(self, reason: NotStored) -> None:
        """Count an answer that was not kept."""
        self._not_stored.labels(reason).inc()

    def personal(self, kinds: Iterable[str]) -> None:
        """Count the kinds of personal data found with one answer, never the data."""
        for kind in kinds:
            self._personal.labels(kind).inc()

    def shared(self, *, confirmed: bool) -> None:
        """Count an answer that other tenants confirmed, or that still waits for them."""
        self._shared.labels("confirmed" if confirmed else "waiting").inc()

    def refresh(self, outcome: str) -> None:
        """Count a refresh: `started`, or `declined` where one is under way or too many are."""
        self._refreshes.labels(outcome).inc()

    def error(self, code: str) -> None:
        """Count an error of our own."""
        self._errors.labels(code).inc()

    def generated(self, upstream: str, seconds: float) -> None:
        """Record a backend's whole answer."""
        self._upstream.labels(upstream).observe(seconds)

    def watch(self, stats: Callable[[], StoreStats], flights: Callable[[], int]) -> None:
        """Read the store's figures whenever the metrics are asked for."""
        self.registry.register(_StoreFigures(stats))
        self._in_flight.set_function(flights)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)


class _StoreFigures(Collector):
    def __init__(self, stats: Callable[[], StoreStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Turn the store's numbers into gauges, those by kind or category with a label."""
        for name, value in stats_document(self._stats()).items():
            if not isinstance(value, int | float | dict):
                continue
            gauge = GaugeMetricFamily(f"hitpath_store_{name}", f"The store's {name.replace('_', ' ')}.", labels=["of"])
            for label, number in value.items() if isinstance(value, dict) else [("", value)]:
                gauge.add_metric([label], number)
            yield gauge


def stats_document(stats: StoreStats) -> dict[str, Any]:
    """Return the store's figures as plain numbers, texts, lists and tables."""
    figures = {item.name: getattr(stats, item.name) for item in fields(stats)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in figures.items()}
