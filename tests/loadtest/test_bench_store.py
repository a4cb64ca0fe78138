"""The measuring itself, on stores too small for the figures to mean anything."""

from __future__ import annotations

from loadtest.bench_store import memory_per_entry, recall_after_churn, start_up, verbs


def test_every_part_gives_its_figures() -> None:
    alone = memory_per_entry(300, one_scope=False)
    assert (alone.entries, alone.scopes) == (300, 300)
    assert alone.accounted_per_entry > 1536
    recall = recall_after_churn(5200, queries=100)
    assert recall.after_churn > 0.9
    started = start_up(300)
    assert 0 < started.first_exact_hit <= started.loaded <= started.graphs_built
    assert verbs(2000).puts_per_second > 0
