"""What the sampler may and must not draw."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling import Sampler, SamplingParams, truncate

SCORES = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
score_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(torch.tensor)


def drawn(params: SamplingParams, count: int, scores: Tensor = SCORES) -> list[int]:
    sampler = Sampler(params, len(scores))
    return [sampler.draw(scores).token for _ in range(count)]


def test_zero_temperature_takes_the_likeliest() -> None:
    assert drawn(SamplingParams(temperature=0.0), 5) == [0] * 5


def test_a_seed_gives_the_same_answer_and_another_another() -> None:
    first, again, other = (drawn(SamplingParams(seed=seed), 50) for seed in (3, 3, 4))
    assert first == again != other


def test_without_a_seed_answers_differ() -> None:
    assert drawn(SamplingParams(), 50) != drawn(SamplingParams(), 50)


def test_high_temperature_flattens() -> None:
    cold = drawn(SamplingParams(temperature=0.3, seed=1), 300).count(0)
    warm = drawn(SamplingParams(temperature=2.0, seed=1), 300).count(0)
    assert cold > warm


def test_presence_penalty_counts_once_and_frequency_each_time() -> None:
    # Token 0 leads by 1: a presence penalty of 0.6 never suffices, a frequency penalty of 0.6 does the second time.
    assert drawn(SamplingParams(temperature=0.0, presence_penalty=0.6), 4) == [0, 0, 0, 0]
    assert drawn(SamplingParams(temperature=0.0, frequency_penalty=0.6), 3) == [0, 0, 1]
    assert drawn(SamplingParams(temperature=0.0, presence_penalty=1.2), 2) == [0, 1]


def test_logit_bias_moves_one_token() -> None:
    assert drawn(SamplingParams(temperature=0.0, logit_bias={4: 100.0}), 2) == [4, 4]
    assert 0 not in drawn(SamplingParams(logit_bias={0: -100.0}, seed=1), 200)


def test_log_probabilities_are_those_of_the_model() -> None:
    choice = Sampler(SamplingParams(temperature=0.0, logit_bias={3: 50.0}, logprobs=2), 6).draw(SCORES)
    expected = torch.log_softmax(SCORES, dim=-1)
    assert choice.token == 3
    assert choice.logprob == float(expected[3])
    assert choice.alternatives == ((0, float(expected[0])), (1, float(expected[1])))


@given(score_lists, st.integers(1, 50))
@settings(max_examples=60)
def test_top_k_keeps_the_k_likeliest(scores: Tensor, top_k: int) -> None:
    kept = truncate(scores, top_k, 1.0) > 0
    least = scores.sort(descending=True).values[min(top_k, len(scores)) - 1]
    assert bool((scores[kept] >= least).all())
    assert int(kept.sum()) >= 1


@given(score_lists, st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_top_p_keeps_the_smallest_set_with_that_mass(scores: Tensor, top_p: float) -> None:
    probabilities = torch.softmax(scores, dim=-1)
    kept = truncate(scores, 0, top_p)
    chosen = probabilities[kept > 0]
    assert float(chosen.sum()) >= top_p - 1e-4
    # Without its least likely member the set would not reach the mass.
    assert float(chosen.sum() - chosen.min()) <= top_p + 1e-4
    assert float(probabilities[kept == 0].max()) <= float(chosen.min()) if bool((kept == 0).any()) else True


def test_end_tokens_wait_for_the_shortest_answer() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, min_tokens=2), len(SCORES), ends=(0, 1))
    assert [sampler.draw(SCORES).token for _ in range(3)] == [2, 2, 0]
