import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.metrics import auc, percentiles, recall_at, share

scores = st.lists(st.sampled_from([-1.0, 0.1, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=30)


def test_auc_by_hand() -> None:
    # Pairs won: .9 beats both, .5 ties one and beats one, .1 loses both: (2 + 1.5 + 0) / 6.
    assert auc([0.9, 0.5, 0.1], [0.5, 0.2]) == pytest.approx(3.5 / 6)


@given(scores, scores)
def test_auc_is_the_share_of_pairs_won(positives: list[float], negatives: list[float]) -> None:
    won = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    assert auc(positives, negatives) == pytest.approx(won / (len(positives) * len(negatives)))


def test_recall_by_hand() -> None:
    negatives = [number / 100 for number in range(100)]
    # One negative in a hundred may exceed the threshold, so it lies at .98.
    assert recall_at([0.985, 0.98, 0.5, 1.0], negatives, 0.01) == 0.5
    assert recall_at([0.985, 0.98, 0.5, 1.0], negatives, 0.05) == 0.75
    assert recall_at([0.1], negatives, 1.0) == 1.0
    assert recall_at([0.9, 0.9], [0.9], 0.01) == 0.0


@given(scores, scores, st.sampled_from([0.01, 0.05, 0.3]))
def test_recall_is_that_of_the_best_threshold_within_the_budget(
    positives: list[float], negatives: list[float], budget: float
) -> None:
    thresholds = {*positives, *negatives, 2.0}
    allowed = [t for t in thresholds if sum(n >= t for n in negatives) <= budget * len(negatives)]
    best = max(sum(p >= t for p in positives) / len(positives) for t in allowed)
    assert recall_at(positives, negatives, budget) == pytest.approx(best)


def test_what_is_undefined_is_none() -> None:
    assert auc([], [0.1]) is None
    assert auc([0.1], []) is None
    assert recall_at([], [0.1], 0.01) is None
    assert recall_at([0.1], [], 0.01) is None
    assert share([]) is None
    assert percentiles([]) is None


def test_shares_and_percentiles() -> None:
    assert share([True, False, True, True]) == 0.75
    assert percentiles([0.001, 0.002, 0.003]) == {"p50": 2.0, "p90": 2.8, "p99": 2.98}
