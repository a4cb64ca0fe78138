"""Chunks placed elsewhere: exact where that can be, and otherwise nothing but what was chosen is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.sdpa import SdpaBackend
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.reuse.blending import Blend, Look, Selector, best, share
from engine.reuse.cachecraft import CacheCraft, Observer, familiar, in_order, overhead, overlap, unfit
from engine.reuse.chunks import BlendPrompt, ChunkKv, ContextIndex, Placed, names_before
from engine.reuse.idle import ELSEWHERE, PIECE, IdleJobs, Refinement
from engine.reuse.known import name_of, text_of
from engine.reuse.placing import moved, turn
from engine.reuse.selectors import CacheBlend, Epic, Full, KvShare, Nothing, Random
from engine.reuse.sensitivity import Early, Sensitive, averaged, deviation_of, measured
from engine.reuse.trial import Trial
from engine.rope import rotate
from tests.engine.checkpoints import write

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
        },
    ),
    "window": ("mistral", {"sliding_window": 24}),
    "normed": ("qwen3", {}),
}
SELECTORS: tuple[Selector, ...] = (
    Nothing(),
    Random(0.2),
    Epic(0.2),
    CacheBlend(((1, 0.2),)),
    CacheBlend(((0, 0.6), (1, 0.4), (2, 0.2)), "v"),
    KvShare(0.2),
    Sensitive(0.2),
    Early(0.2),
    Early(0.0),
    CacheCraft(0.5, focus=0.5),
)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family, changes = VARIANTS[request.param]
    directory: Path = tmp_path_factory.mktemp(request.param)
    write(directory, family, **changes)
    return load_checkpoint(directory, name=request.param, dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("plain")
    write(directory)
    return load_checkpoint(directory, name="plain", dtype="float32")


def some(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    row: list[int] = torch.randint(0, 256, (count,), generator=generator).tolist()
    return row


def prompt_of(checkpoint: Checkpoint, *, head: int = 3, between: int = 2, measure: bool = False) -> BlendPrompt:
    """Three chunks of 20 tokens with a few tokens around each, and a question of six."""
    store = Trial(checkpoint, 128)
    tokens, placed = some(head, 99), []
    for seed in range(3):
        ids = some(20, seed)
        chunk = store.chunk(ids)
        if measure:
            chunk = measured(chunk, [store.chunk(ids, after=some(15, 50 + seed))])
        placed.append(Placed(chunk, len(tokens), 0, 20, name=bytes([seed])))
        tokens += ids + some(between, 10 + seed)
    return BlendPrompt(tokens + some(6, 20), tuple(placed))


def test_all_computed_is_an_ordinary_prefill(variant: Checkpoint) -> None:
    prompt = prompt_of(variant)
    trial = Trial(variant, 128)
    torch.testing.assert_close(trial.blend(prompt, Full(), 6), trial.compute(prompt.tokens, 6), atol=1e-4, rtol=0)


def test_a_chunk_at_the_start_needs_nothing(variant: Checkpoint) -> None:
    trial, ids = Trial(variant, 128), some(40, 1)
    tokens = ids + some(7, 2)
    if variant.model.rope.stretches:
        ids, tokens = ids[:20], [*ids[:20], *tokens[40:]]  # beyond the trained length angles depend on it
    exact = trial.compute(tokens, 7)
    prompt = BlendPrompt(tokens, (Placed(Trial(variant, 128).chunk(ids), 0, 0, len(ids)),))
    for selector in SELECTORS:
        torch.testing.assert_close(trial.blend(prompt, selector, 7), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("before", "after"), [(0, 61), (17, 3), (5, 5), (40, 70_000), (70_000, 0)])
def test_keys_are_turned_exactly(variant: Checkpoint, before: int, after: int) -> None:
    """Turned for one place and moved, keys are those turned for the other place: to float32's last digits."""
    rope, config = variant.model.rope, variant.config
    keys = torch.randn(12, config.kv_heads, config.head_dim, generator=torch.Generator().manual_seed(1))
    spans = (before + 12, after + 12)

    def at(start: int, span: int) -> torch.Tensor:
        positions = torch.arange(start, start + 12)
        return rotate(keys, *rope(positions, torch.full_like(positions, span) if rope.stretches else None))

    there = moved(at(before, spans[0]), turn(rope, 12, before, after, spans))
    torch.testing.assert_close(there, at(after, spans[1]), atol=1e-5, rtol=0)


def test_what_is_placed_can_be_taken_again(variant: Checkpoint) -> None:
    trial, tokens = Trial(variant, 128), some(31, 4)
    chunk = Trial(variant, 128).chunk(tokens[6:26])
    trial.blend(BlendPrompt(tokens, (Placed(chunk, 6, 0, 20),)), Nothing(), 1)
    for ours, theirs in zip(chunk.layers, trial.taken(tokens, 6, 26).layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_without_turning_it_is_wrong(plain: Checkpoint) -> None:
    prompt, trial = prompt_of(plain), Trial(plain, 128)
    exact = trial.compute(prompt.tokens, 6)
    errors = [(trial.blend(prompt, Nothing(), 6, turned=turned) - exact).abs().mean() for turned in (True, False)]
    assert errors[1] > errors[0] > 1e-3


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)
def test_only_what_is_chosen_is_computed(plain: Checkpoint, selector: Selector) -> None:
    prompt, trial = prompt_of(plain, measure=True), Trial(plain, 128)
    blend = Blend(prompt, selector)
    trial.run(prompt, blend)
    fresh = int((~prompt.reused).sum())
    assert fresh <= blend.computed[-1] <= fresh + 0.6 * 60
    assert blend.computed == sorted(blend.computed, reverse=True)


def test_what_is_not_chosen_stays_as_it_was_brought(plain: Checkpoint) -> None:
    prompt, trial = prompt_of(plain, measure=True), Trial(plain, 128)
    trial.blend(prompt, Nothing(), 1)
    brought = trial.taken(prompt.tokens, 0, len(prompt.tokens))
    for selector in (Random(0.2), Epic(0.2), Sensitive(0.2)):
        blend = Blend(prompt, selector)
        trial.run(prompt, blend)
        found = trial.taken(prompt.tokens, 0, len(prompt.tokens))
        left = torch.ones(len(prompt.tokens), dtype=torch.bool)
        left[blend.rows] = False
        for ours, theirs in zip(found.layers, brought.layers, strict=True):
            assert torch.equal(ours[:, left], theirs[:, left])
            # In the first layer nothing depends on other tokens, so what is computed again is what was brought.
        torch.testing.assert_close(found.layers[0], brought.layers[0], atol=1e-4, rtol=0)
        assert not torch.equal(found.layers[1][:, ~left], brought.layers[1][:, ~left])


@pytest.mark.parametrize(
    "selector", [SELECTORS[0], *SELECTORS[2:5], SELECTORS[6]], ids=lambda selector: type(selector).__name__
)
def test_computed_tokens_see_nothing_that_comes_after(plain: Checkpoint, selector: Selector) -> None:
    """With another question behind them, all chunks come out the same."""
    prompt, trial = prompt_of(plain), Trial(plain, 128)
    end = prompt.placed[-1].stop
    found = []
    for question in (prompt.tokens[end:], some(8, 77)):
        tokens = [*prompt.tokens[:end], *question]
        trial.blend(BlendPrompt(tokens, prompt.placed), selector, 8)
        found.append(trial.taken(tokens, 0, end))
    for ours, theirs in zip(found[0].layers, found[1].layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_more_is_closer(plain: Checkpoint) -> None:
    prompt, trial = prompt_of(plain, measure=True), Trial(plain, 128)
    exact = trial.compute(prompt.tokens, 6)
    for make in (lambda r: CacheBlend(((1, r),)), Sensitive):
        errors = [float((trial.blend(prompt, make(ratio), 6) - exact).abs().mean()) for ratio in (0.05, 0.5, 1.0)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-4


def test_a_part_of_a_chunk_is_placed_too(plain: Checkpoint) -> None:
    ids, trial = some(40, 5), Trial(plain, 128)
    chunk = Trial(plain, 128).chunk(ids)
    prompt = BlendPrompt([*some(5, 6), *ids[8:30], *some(4, 7)], (Placed(chunk, 5, 8, 22),))
    torch.testing.assert_close(trial.blend(prompt, Full(), 4), trial.compute(prompt.tokens, 4), atol=1e-4, rtol=0)
    assert trial.blend(prompt, Epic(0.3), 4).isfinite().all()


def test_sensitivity_finds_the_tokens_that_move(plain: Checkpoint) -> None:
    store, ids = Trial(plain, 128), some(20, 8)
    alone = store.chunk(ids)
    chunk = measured(alone, [store.chunk(ids, after=some(12, 9)), store.chunk(ids, after=some(30, 10))])
    assert chunk.sensitivity is not None
    assert chunk.sensitivity.shape == (20,)
    assert float(chunk.sensitivity.min()) > 0
    prompt = BlendPrompt([*some(5, 6), *ids, *some(4, 7)], (Placed(chunk, 5, 0, 20),))
    picked = Sensitive(0.25).choose(prompt)
    assert int(picked.sum()) == 5
    assert chunk.sensitivity[picked[5:25]].min() >= chunk.sensitivity[~picked[5:25]].max()
    unmeasured = BlendPrompt(prompt.tokens, (Placed(alone, 5, 0, 20),))
    assert torch.equal(Sensitive(0.25).choose(unmeasured), Epic(0.25).choose(unmeasured))


def test_prompts_that_do_not_fit_their_chunks_are_refused(plain: Checkpoint) -> None:
    ids = some(10, 1)
    chunk = Trial(plain, 64).chunk(ids)
    with pytest.raises(ValueError, match="other tokens"):
        BlendPrompt([1, *ids], (Placed(chunk, 0, 0, 10),))
    with pytest.raises(ValueError, match="overlap"):
        BlendPrompt([*ids, *ids], (Placed(chunk, 0, 0, 10), Placed(chunk, 5, 0, 10)))
    with pytest.raises(ValueError, match="in every layer"):
        ChunkKv((1, 2, 3), chunk.layers)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=1, max_size=30), st.integers(0, 35))
def test_best(rows: list[tuple[float, bool]], count: int) -> None:
    scores, allowed = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    chosen = best(scores, allowed, count)
    assert not (chosen & ~allowed).any()
    assert int(chosen.sum()) == min(count, int(allowed.sum()))
    left = allowed & ~chosen
    assert not chosen.any() or not left.any() or scores[chosen].min() >= scores[left].max()


def test_share() -> None:
    assert [share(0.0, 9), share(0.01, 9), share(0.5, 9), share(1.0, 9), share(0.3, 0)] == [0, 1, 4, 9, 0]


def test_texts_of_a_prompt_in_order() -> None:
    tokens = some(30, 1)
    assert in_order(tokens, [(9, b"two"), (4, b"one")]) == ((0, name_of(tokens[:4])), (4, b"one"), (9, b"two"))
    assert in_order(tokens, [(0, b"one")]) == ((0, name_of(())), (0, b"one"))
    texts = in_order(tokens, [(9, b"two"), (4, b"one")])
    found = [names_before(texts, start) for start in (9, 4)]
    assert found == [(name_of(tokens[:4]), b"one"), (name_of(tokens[:4]),)]
    assert BlendPrompt(tokens, ()).texts == ((0, b""),)
    assert in_order(tokens, []) == ((0, name_of(tokens)),)


def watched(checkpoint: Checkpoint, tokens: list[int], texts: Any, size: int) -> Observer:
    observer = Observer(texts, len(tokens), checkpoint.config.windows)
    for _ in Trial(checkpoint, 64).pieces(tokens, size, observer):
        pass
    return observer


def test_context_index_of_a_real_prompt(plain: Checkpoint) -> None:
    tokens = some(30, 1)
    observer = watched(plain, tokens, ((0, b"head"), (4, b"one"), (16, b"two")), 30)
    torch.testing.assert_close(observer.mass.sum(1), torch.ones(30))
    assert float(observer.mass[:4, 1:].sum()) == 0.0
    context = observer.context(16, 27)
    assert context.prefix == (b"head", b"one")
    assert len(context.inter) == 2
    assert 0.0 < context.impact < 1.0
    assert context.outside.shape == (11,)
    assert float(context.outside.sum()) == pytest.approx(sum(context.inter), rel=1e-5)
    first = watched(plain, tokens, ((0, b"empty"), (0, b"one"), (16, b"two")), 30).context(0, 16)
    assert (first.prefix, first.inter, float(first.outside.max())) == ((b"empty",), (0.0,), 0.0)


def test_observed_attention_is_that_of_the_selectors_and_the_same_in_pieces(variant: Checkpoint) -> None:
    """Each token a text of its own, so that what is summed up is the attention itself."""
    tokens = some(30, 1)
    texts = tuple((place, bytes([place])) for place in range(30))
    mass = watched(variant, tokens, texts, 30).mass
    torch.testing.assert_close(watched(variant, tokens, texts, 7).mass, mass, atol=1e-5, rtol=0)
    torch.testing.assert_close(mass.sum(1), torch.ones(30))
    assert float(mass.triu(1).abs().max()) == 0.0
    if (window := variant.config.windows[0]) is not None:
        assert float(mass.tril(-window).abs().max()) == 0.0
        return
    seen = torch.zeros(30, 30)

    class Looking(Nothing):
        checks = (0, 1, 2)

        def narrow(self, layer: int, look: Look) -> torch.Tensor:
            seen.add_(look.attention(torch.ones(30, dtype=torch.bool)).mean(0) / 3)
            return torch.ones(30, dtype=torch.bool)

    Trial(variant, 64).blend(BlendPrompt(tokens, ()), Looking(), 30)
    torch.testing.assert_close(mass, seen, atol=1e-5, rtol=0)


def test_overlap_counts_what_is_there_again_and_in_which_order() -> None:
    context = ContextIndex((b"h", b"a", b"b", b"c"), (9.0, 3.0, 1.0, 0.0), torch.zeros(4), 0.8)

    def kept(names: bytes) -> float:
        return overlap(context, [bytes([name]) for name in names])

    assert kept(b"habc") == 1.0
    assert kept(b"ha") == 0.75
    assert kept(b"hcba") == 0.0
    assert kept(b"hbac") == pytest.approx(2 / 3)
    assert kept(b"h") == 0.0
    assert kept(b"gabc") == pytest.approx(4 / 13)  # the head is another
    assert overlap(context, ()) == 0.0
    assert overhead(context, [b"h", b"a", b"b", b"c"]) == 0.0
    assert overhead(context, [b"h"]) == pytest.approx(0.8)
    assert overhead(context, [b"h"], scale=2.0) == 1.0
    assert overhead(None, []) == 0.5


def test_what_stood_first_is_where_it_was_only_if_it_stands_first() -> None:
    first = ContextIndex((b"h",), (9.0,), torch.zeros(4), 0.6)
    assert [overlap(first, prefix) for prefix in ([b"h"], [b"h", b"a"], [b"g"])] == [1.0, 0.0, 0.0]
    twice = ContextIndex((b"h", b"a", b"b", b"a"), (0.0, 1.0, 1.0, 2.0), torch.zeros(4), 0.8)
    assert overlap(twice, [b"h", b"a", b"b", b"a"]) == 1.0
    assert overlap(twice, [b"h", b"a", b"b"]) == 0.5


def test_the_version_from_the_most_similar_prompt_is_the_best() -> None:
    one, two = (ContextIndex((b"h", name), (1.0, 1.0), torch.zeros(4), 0.9) for name in (b"x", b"y"))
    for versions in ([one, two, None], [None, two, one]):
        assert min(versions, key=lambda context: unfit(context, [b"h", b"y"])) is two
        assert min(versions, key=lambda context: unfit(context, [b"h", b"x"])) is one
        assert min(versions, key=lambda context: unfit(context, [b"h"])) is not None
    assert [familiar(context, [b"h", b"x"]) for context in (one, two, None)] == [True, False, False]


def test_where_the_context_is_the_same_cachecraft_computes_nothing(plain: Checkpoint) -> None:
    """And where nothing of it is, about as much as attention went outside; both give what their tokens say."""
    head, question, store, trial = some(4, 9), some(6, 8), Trial(plain, 128), Trial(plain, 128)
    texts = [some(20, seed) for seed in range(3)]

    def prompt(order: list[int], chunks: dict[int, ChunkKv]) -> BlendPrompt:
        tokens, placed, starts = list(head), [], []
        for which in order:
            starts.append((len(tokens), name_of(texts[which])))
            if which in chunks:
                placed.append(Placed(chunks[which], len(tokens), 0, 20, starts[-1][1]))
            tokens += texts[which]
        tokens += question
        return BlendPrompt(tokens, tuple(placed), in_order(tokens, starts))

    first = prompt([0, 1], {})
    observer = Observer(first.texts, len(first.tokens), plain.config.windows)
    store.compute(first.tokens, 1, observer)
    chunks = {
        which: store.taken(first.tokens, at, at + 20, observer.context(at, at + 20)) for which, at in ((0, 4), (1, 24))
    }
    same = prompt([0, 1], chunks)
    assert not CacheCraft().choose(same).any()
    exact = trial.compute(same.tokens, 6)
    torch.testing.assert_close(trial.blend(same, CacheCraft(), 6), exact, atol=1e-3, rtol=0)
    other = prompt([2, 1], chunks)
    chosen = CacheCraft().choose(other)
    index = chunks[1].context
    assert index is not None
    assert 0 < int(chosen.sum()) < 20
    assert index.outside[chosen[24:44]].min() >= index.outside[~chosen[24:44]].max()


def test_the_mean_of_a_chunk_is_nearer_to_what_comes_next(plain: Checkpoint) -> None:
    store, ids = Trial(plain, 128), some(20, 5)
    versions = [store.chunk(ids, after=some(15, 60 + seed)) for seed in range(4)]
    mean, unseen = averaged(versions), store.chunk(ids, after=some(15, 90))
    singles = [float(deviation_of(version, unseen).sum()) for version in versions]
    assert float(deviation_of(mean, unseen).sum()) < min(singles)
    assert mean.sensitivity is not None
    assert mean.before == 15  # nowhere exact
    same = averaged([versions[0]] * 3)
    torch.testing.assert_close(same.layers[2], versions[0].layers[2])
    with pytest.raises(ValueError, match="two texts"):
        averaged(versions[:1])
    with pytest.raises(ValueError, match="same tokens"):
        averaged([versions[0], store.chunk(some(20, 6), after=[1])])


def test_what_is_computed_when_there_is_time_is_the_mean_behind_other_texts(plain: Checkpoint) -> None:
    tokens, head = tuple(some(50, 21)), tuple(some(5, 22))
    others = [tuple(some(length, seed)) for length, seed in ((90, 23), (2 * PIECE + 40, 24))]
    assert len(others) == ELSEWHERE
    found: list[ChunkKv] = []

    def never(*_: object) -> None:
        raise AssertionError

    jobs = IdleJobs(
        plain,
        SdpaBackend(),
        "mean",
        seen=lambda _: None,
        others=lambda text, most: others,
        refined=lambda job, chunk: found.append(chunk),
        indexed=never,
        compared=never,
    )
    jobs.refine(Refinement(text_of("a", tokens), tokens, "t", head))
    while jobs.step():
        pass
    behind = [(*head, *other[: 2 * PIECE]) for other in others]
    wanted = averaged([Trial(plain, 700).chunk(tokens, after=after) for after in behind])
    for seen, expected in zip(found[0].layers, wanted.layers, strict=True):
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
    assert found[0].sensitivity is not None
    assert wanted.sensitivity is not None
    torch.testing.assert_close(found[0].sensitivity, wanted.sensitivity, atol=1e-3, rtol=1e-3)
