"""What `/metrics` says of trust: budgets, checks, complaints, the worth of comparing, the load of the backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from policies.budget import Standing
from policies.economics import Stage
from policies.load import Load
from policies.reasons import Check, Complaint

_BUDGET = {
    "point": "Acceptance point that the budget allows; absent while it allows none.",
    "share": "Share of the hits that is checked.",
    "savings": "Wrong hits that the budget still allows; below 0 right hits are owed.",
    "hits": "Hits by meaning that were counted.",
    "checked": "Hits that were checked.",
    "wrong": "Sum of what the checks of hits found, 1 for wrong.",
    "exhaustions": "Times that the budget was exhausted.",
}
_ECONOMICS = {
    "hit_rate": "Recent share of comparisons that ended in a hit.",
    "break_even": "Hit rate from which on comparing pays.",
    "saved_seconds": "Generation time saved by hits by meaning, less what all comparisons took.",
    "saved_price": "Money saved by hits by meaning.",
}


class TrustMetrics:
    """Counts checks and complaints; the rest is read when it is asked for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._checks = Counter(
            "hitpath_checks", "Stored answers compared with the backend's.", ["outcome"], registry=registry
        )
        self._complaints = Counter("hitpath_complaints", "Hits said to be wrong.", ["kind"], registry=registry)
        for outcome in Check:
            self._checks.labels(outcome)
        for kind in Complaint:
            self._complaints.labels(kind)

    def check(self, outcome: Check) -> None:
        """Count a check."""
        self._checks.labels(outcome).inc()

    def complaint(self, kind: Complaint) -> None:
        """Count a complaint."""
        self._complaints.labels(kind).inc()

    def watch(
        self, stats: Callable[[], Mapping[str, Mapping[str, Any]]], loads: Callable[[], Mapping[str, Load]]
    ) -> None:
        """Read these figures whenever the metrics are asked for."""
        self._registry.register(_Figures(stats, loads))


class _Figures(Collector):
    def __init__(
        self, stats: Callable[[], Mapping[str, Mapping[str, Any]]], loads: Callable[[], Mapping[str, Load]]
    ) -> None:
        self._stats = stats
        self._loads = loads

    def collect(self) -> Iterable[Metric]:
        """Turn the figures into gauges by category, and the loads into gauges by upstream."""
        stats = self._stats()
        for group, names in (("budget", _BUDGET), ("economics", _ECONOMICS)):
            for name, what in names.items():
                yield _gauge(f"hitpath_{group}_{name}", what, {key: item[group] for key, item in stats.items()}, name)
        yield _states("hitpath_budget_standing", "budget", "standing", Standing, stats)
        yield _states("hitpath_semantic_stage", "economics", "stage", Stage, stats)
        load = GaugeMetricFamily("hitpath_load", "Load of a backend, 0 to 1.", labels=["upstream"])
        for upstream, seen in self._loads().items():
            load.add_metric([upstream], seen.level)
        yield load


def _gauge(metric: str, what: str, figures: Mapping[str, Mapping[str, Any] | None], name: str) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(metric, what, labels=["category"])
    for category, group in figures.items():
        if group is not None and group[name] is not None:
            gauge.add_metric([category], group[name])
    return gauge


def _states(
    metric: str, group: str, name: str, states: Iterable[str], stats: Mapping[str, Mapping[str, Any]]
) -> GaugeMetricFamily:
    """1 for the state that a category is in, 0 for the others."""
    gauge = GaugeMetricFamily(metric, f"The {name} of a category.", labels=["category", "state"])
    for category, figures in stats.items():
        for state in states if figures[group] is not None else ():
            gauge.add_metric([category, state], float(figures[group][name] == state))
    return gauge
