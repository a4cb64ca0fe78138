"""How the judge's training cuts, mixes, exports and calibrates; that it learns, is the model card's matter."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gateway.embedding.local import find_model
from gateway.judge.load import head_of
from gateway.judge.model import PairModel, feeds
from gateway.judge.pairs import TEXT_TOKENS, row
from loadtest.metrics import reliability
from loadtest.training import judge_edits as edits
from loadtest.training import judge_export as export
from loadtest.training.judge import FALL, FIRST, SECOND, averaged, batches, rate, started, tensors, train
from loadtest.training.judge_calibrate import BUDGETS, ENOUGH, Judged, fitted, points_of, report
from loadtest.training.judge_data import Sample, derived, epoch, split
from loadtest.training.judge_net import PairNet
from loadtest.training.judge_text import Tokens

TEXTS = [
    "How do I reset my password?",
    "How can I get a new password for my account?",
    "What is 15% of the 80 apples that Ann Smith bought in Paris?",
    "Is it faster to go from Rome to Milan by train or by car?",
]


def sample(a: str, b: str, label: float, name: str = "qqp") -> Sample:
    return Sample(a, b, label, name)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.booleans()), max_size=200))
def test_no_text_of_a_group_is_on_both_sides(links: list[tuple[int, int, bool]]) -> None:
    learn, held = split([sample(f"text {a}", f"text {b}", float(like)) for a, b, like in links])
    seen, unseen = ({text for item in part for text in (item.a, item.b)} for part in (learn, held))
    assert not seen & unseen


def test_most_is_learnt_and_some_held_out() -> None:
    learn, held = split([sample(f"question {number}", f"answer {number}", 1.0) for number in range(1000)])
    assert 100 < len(held) < 200
    assert len(learn) + len(held) == 1000


def test_what_follows_from_two_pairs() -> None:
    pairs = [("a", "b", 1), ("b", "c", 1), ("a", "d", 0), ("d", "e", 0)]
    samples = [sample(a, b, label, "mqp_medical") for a, b, label in pairs]
    found = {(frozenset((item.a, item.b)), item.label) for item in derived(samples, samples)}
    assert found == {(frozenset("ac"), 1.0), (frozenset("bd"), 0.0)}
    assert not derived(samples, [*samples, sample("c", "a", 0.0), sample("D", "b?", 0.0)])
    assert not derived([sample(a, b, label, "qqp") for a, b, label in pairs], [])


def test_an_epoch_has_real_and_edited_pairs() -> None:
    samples = [sample(TEXTS[number % 4] + f" {number}", TEXTS[number % 3], 1.0) for number in range(60)]
    mix = epoch(samples, [], random.Random(1))
    assert mix == epoch(samples, [], random.Random(1))
    assert len(mix) > 1000
    assert {item.label for item in mix} == {0.0, 1.0}
    assert all(item.a != item.b for item in mix if item.label == 0)


def test_a_share_says_how_often_a_row_is_seen() -> None:
    samples = [sample(f"question {number}", f"answer {number}", 1.0, "mrpc") for number in range(60)]
    for share, seen in ((0.0, 0), (0.5, 30), (2.0, 120)):
        mix = epoch(samples, [], random.Random(1), {"mrpc": share})
        assert sum({item.a, item.b} in [{one.a, one.b} for one in samples] for item in mix) == seen


@pytest.mark.parametrize("rule", dict.fromkeys([*edits.NEGATIVE, *edits.POSITIVE]), ids=lambda rule: rule.__name__)
def test_a_rule_changes_a_text_or_says_that_it_cannot(rule: edits.Rule) -> None:
    for text in [*TEXTS, "", "word", "12", "a and b", "In May, she was not at home."]:
        for seed in range(5):
            new = rule(text, random.Random(seed))
            assert new is None or isinstance(new, str)


@pytest.mark.parametrize(
    ("rule", "text", "made"),
    [
        (edits.flip, "a long position", {"a short position"}),
        (edits.swap_numbers, "3 of 40", {"40 of 3"}),
        (edits.negate, "Is he not well?", {"Is he well?"}),
        (edits.turn_conjuncts, "salt and pepper", {"pepper and salt"}),
        (edits.drop_detail, "One. Two. Three?", {"One. Three?", "Two. Three?"}),
    ],
)
def test_a_rule_by_hand(rule: edits.Rule, text: str, made: set[str]) -> None:
    assert {rule(text, random.Random(seed)) for seed in range(20)} == made


def test_batches_take_every_pair_once_and_are_of_like_length() -> None:
    lengths = [random.Random(number).randrange(5, 300) for number in range(500)]
    cut = batches(lengths, random.Random(1))
    assert sorted(index for batch in cut for index in batch.pairs) == list(range(500))
    for batch in cut:
        assert all(lengths[index] <= batch.tokens for index in batch.pairs)


def test_the_rate_rises_stays_and_falls() -> None:
    given = replace(FIRST, steps=10_000)
    assert rate(given, 1) == pytest.approx(given.rate / given.warm_up)
    assert rate(given, given.warm_up) == given.rate == pytest.approx(rate(given, int((1 - FALL) * 10_000)))
    assert rate(given, 10_000) == 0


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(find_model() / "tokenizer.json")


@pytest.fixture(scope="module")
def net() -> PairNet:
    torch.manual_seed(0)
    return PairNet.start(load_file(find_model() / "model.safetensors")).eval()


def test_training_cuts_long_texts(tokens: Tokens) -> None:
    assert len(tokens("word " * 500)) == TEXT_TOKENS


def test_the_int8_graph_says_what_the_net_says(net: PairNet, tokens: Tokens) -> None:
    rows = [row(tokens(a), tokens(b), tokens.start, tokens.end) for a in TEXTS for b in TEXTS]
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    words = net.words.numpy()
    graph = export.quantised(state, export.ranges(state, rows, words)).SerializeToString()
    model = PairModel(graph, find_model() / "model.safetensors", find_model() / "tokenizer.json")
    longest = max(len(item.ids) for item in rows)
    with torch.no_grad():
        wanted = net(*tensors(rows, longest)).tolist()
    found = [model.logits(a, [b])[0] for a in TEXTS for b in TEXTS]
    assert np.corrcoef(np.array(wanted), np.array(found, float))[0, 1] > 0.97
    assert feeds(rows, words)["words"].shape == (1, len(rows) * longest, 384)


def test_a_stopped_run_goes_on_where_it_was(tokens: Tokens, tmp_path: Path) -> None:
    samples = [
        sample(TEXTS[number % 4], TEXTS[number % 3], float(number % 2), "vsr_cache_cases") for number in range(60)
    ]
    weights = load_file(find_model() / "model.safetensors")

    def run(keep: Path, every: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        average, minutes = train(PairNet.start(weights), (samples, []), tokens, replace(FIRST, steps=4), 1, keep, every)
        assert minutes > 0
        return average

    whole = run(tmp_path / "kept", 3)
    assert torch.load(tmp_path / "kept")["step"] == 3
    resumed = run(tmp_path / "kept", 1000)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


def test_runs_begin_alike_and_their_mean_lies_between_them(tokens: Tokens) -> None:
    samples = [sample(TEXTS[number % 4], TEXTS[number % 3], float(number % 2)) for number in range(60)]
    weights = load_file(find_model() / "model.safetensors")
    first, second = (
        train(started(weights), (samples, []), tokens, replace(SECOND, steps=2), seed)[0] for seed in (1, 2)
    )
    begun = started(weights).state_dict()
    assert all(torch.equal(value, begun[name]) for name, value in started(weights).state_dict().items())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, value in averaged([first, second]).items():
        torch.testing.assert_close(value - first[name], second[name] - value)


def judged(count: int) -> list[Judged]:
    chance = np.random.default_rng(1)
    found = []
    for number in range(count):
        truth = chance.normal(0, 2)
        label = float(chance.random() < 1 / (1 + np.exp(-truth)))
        cosine = 0.8 + 0.02 * truth
        category = "math" if number % 2 else "rare" if number % 50 == 0 else "general"
        made = Sample(f"a{number}", f"b{number}", label, "qqp" if number % 3 else "mqp_medical")
        found.append(Judged(made, truth + chance.normal(0, 0.2), float(cosine), category, number % 40 == 0))
    return found


def test_calibration_gives_probabilities_and_points() -> None:
    found = judged(1200)
    head = fitted(found)
    left = [item for item in found if not item.refused]
    shares = np.array([head.probability(item.logit, item.cosine, item.category) for item in left])
    for _, mean, share in reliability(shares, np.array([item.sample.label for item in left]), 5):
        assert abs(mean - share) < 0.12
    document, card = report(found, [item.sample for item in found], 25.0)
    assert [budget for budget, _ in document["points"]] == list(BUDGETS)
    values = [point for _, point in document["points"]]
    assert values == sorted(values, reverse=True)
    assert {"general", "math"} == set(document["category_points"])
    assert sum(item.category == "rare" for item in found) < ENOUGH
    assert head_of(document).point(0.01, "math") >= 0.5
    assert "25 CPU minutes" in card


def test_pairs_that_strayed_into_a_category_weigh_there_what_they_weigh_among_all() -> None:
    def pair(name: str, number: int, label: float, category: str) -> Judged:
        return Judged(Sample(f"{name}{number}", "b", label, name), 0.0, 0.9, category, False)

    own = [pair("gsmplus", number, 1.0, "math") for number in range(400)]
    strayed = [pair("paws_x_en", number, 0.0, "math") for number in range(4)]
    others = [pair("paws_x_en", number, 1.0, "general") for number in range(4, 400)]
    shares = np.array([0.8] * 400 + [0.9] * 4 + [0.8] * 396)
    found = points_of([*own, *strayed, *others], shares)
    at = dict(found["category_points"]["math"])
    # 4 of 404 that weigh alike are wrong, and half as many again are repetitions.
    assert (at[0.005], at[0.01]) == (0.9, 0.8)
    assert dict(points_of(own + strayed, shares[:404])["category_points"]["math"])[0.01] == 1.0
