"""What may and must not be drawn, alone and in batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling import Drawing, SamplingParams, draw, truncate

SCORES = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
score_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(torch.tensor)


def drawn(params: SamplingParams, count: int, scores: Tensor = SCORES, prompt: tuple[int, ...] = ()) -> list[int]:
    drawing = Drawing(params, prompt)
    return [draw(scores[None], [drawing])[0].token for _ in range(count)]


def kept(scores: Tensor, params: SamplingParams) -> set[int]:
    """Tokens that may be drawn."""
    probabilities, ids = truncate(scores[None], [params])
    return set(ids[probabilities > 0].tolist())


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


def test_tokens_come_as_often_as_they_are_likely() -> None:
    drawing = Drawing(SamplingParams(seed=5), ())
    counts = torch.zeros(len(SCORES))
    for _ in range(4000):
        counts[draw(SCORES[None], [drawing])[0].token] += 1
    expected = torch.softmax(SCORES, -1) * 4000
    # Pearson's statistic with 5 degrees of freedom; 20.5 is its 99.9th percentile, and the seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5


def test_presence_penalty_counts_once_and_frequency_each_time() -> None:
    # Token 0 leads by 1: a presence penalty of 0.6 never suffices, a frequency penalty of 0.6 does the second time.
    assert drawn(SamplingParams(temperature=0.0, presence_penalty=0.6), 4) == [0, 0, 0, 0]
    assert drawn(SamplingParams(temperature=0.0, frequency_penalty=0.6), 3) == [0, 0, 1]
    assert drawn(SamplingParams(temperature=0.0, presence_penalty=1.2), 2) == [0, 1]


def test_repetition_penalty_counts_the_prompt_too() -> None:
    assert drawn(SamplingParams(temperature=0.0, repetition_penalty=3.0), 3, prompt=(0,)) == [1, 0, 0]
    # Negative scores are made worse, not better.
    scores = torch.tensor([-1.0, -1.5])
    assert drawn(SamplingParams(temperature=0.0, repetition_penalty=2.0), 1, scores, prompt=(0,)) == [1]


def test_logit_bias_moves_one_token() -> None:
    assert drawn(SamplingParams(temperature=0.0, logit_bias={4: 100.0}), 2) == [4, 4]
    assert 0 not in drawn(SamplingParams(logit_bias={0: -100.0}, seed=1), 200)


def test_log_probabilities_are_those_of_the_model() -> None:
    asked = [
        Drawing(SamplingParams(temperature=0.0, logit_bias={3: 50.0}, logprobs=2), ()),
        Drawing(SamplingParams(temperature=0.0), ()),
        Drawing(SamplingParams(temperature=0.0, logprobs=0), ()),
    ]
    forced, silent, plain = draw(SCORES.expand(3, -1), asked)
    expected = torch.log_softmax(SCORES, dim=-1)
    assert forced.token == 3
    assert forced.logprob == float(expected[3])
    assert forced.alternatives == ((0, float(expected[0])), (1, float(expected[1])))
    assert (silent.token, silent.logprob) == (0, None)
    assert (plain.token, plain.logprob, plain.alternatives) == (0, float(expected[0]), ())


@given(score_lists, st.integers(1, 50))
@settings(max_examples=60)
def test_top_k_keeps_the_k_likeliest(scores: Tensor, top_k: int) -> None:
    chosen = kept(scores, SamplingParams(top_k=top_k))
    least = scores.sort(descending=True).values[min(top_k, len(scores)) - 1]
    assert all(scores[token] >= least for token in chosen)
    assert 1 <= len(chosen) <= top_k


@given(score_lists, st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_top_p_keeps_the_smallest_set_with_that_mass(scores: Tensor, top_p: float) -> None:
    probabilities = torch.softmax(scores, dim=-1)
    chosen = kept(scores, SamplingParams(top_p=top_p))
    mass = [float(probabilities[token]) for token in chosen]
    assert sum(mass) >= top_p - 1e-4
    # Without its least likely member the set would not reach the mass.
    assert sum(mass) - min(mass) <= top_p + 1e-4
    assert all(probabilities[token] <= min(mass) for token in range(len(scores)) if token not in chosen)


@given(score_lists, st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_min_p_keeps_what_is_likely_enough(scores: Tensor, min_p: float) -> None:
    probabilities = torch.softmax(scores.double(), dim=-1)
    chosen = kept(scores, SamplingParams(min_p=min_p))
    bar = min_p * probabilities.max()
    assert all(probabilities[token] >= bar * 0.999 for token in chosen)
    assert all(probabilities[token] <= bar * 1.001 for token in range(len(scores)) if token not in chosen)


def test_mass_beyond_the_first_candidates_is_not_lost() -> None:
    """A flat distribution over more tokens than are tried first."""
    probabilities, ids = truncate(torch.zeros(1, 5000), [SamplingParams(top_p=0.9)])
    assert int((probabilities > 0).sum()) == pytest.approx(4500, abs=2)
    assert len(set(ids[0].tolist())) == 5000


def test_end_tokens_wait_for_the_shortest_answer() -> None:
    drawing = Drawing(SamplingParams(temperature=0.0, min_tokens=2), (), ends=(0, 1))
    assert [draw(SCORES[None], [drawing])[0].token for _ in range(3)] == [2, 2, 0]


class Only:
    """Allows one token."""

    def __init__(self, token: int, size: int) -> None:
        self._mask = torch.zeros(-(-size // 32), dtype=torch.int64)
        self._mask[token // 32] = 1 << (token % 32)

    def mask(self) -> Tensor:
        return self._mask.to(torch.int32)


@pytest.mark.parametrize("token", [0, 5, 31, 32, 63, 69])
def test_a_guide_has_the_last_word(token: int) -> None:
    scores = torch.linspace(5, -5, 70)
    drawing = Drawing(SamplingParams(logit_bias={1: 100.0}), (), guide=Only(token, 70))
    assert draw(scores[None], [drawing])[0].token == token


settings_of_one = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 1, 3]),
    min_p=st.sampled_from([0.0, 0.1]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 9),
    logprobs=st.sampled_from([None, 1, 3]),
)


@given(st.lists(settings_of_one, min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=80)
def test_an_answer_does_not_depend_on_its_batch(together: list[SamplingParams], seed: int) -> None:
    scores = torch.randn(4, len(together), 30, generator=torch.Generator().manual_seed(seed))
    alone = [Drawing(params, (1, 2)) for params in together]
    batch = [Drawing(params, (1, 2)) for params in together]
    for step in scores:
        expected = [draw(step[i : i + 1], [drawing])[0] for i, drawing in enumerate(alone)]
        assert draw(step, batch) == expected
