"""Blended sequences among others, in steps cut anywhere: what is exact stays exact, and nobody disturbs anybody."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.attention import AttentionBackend
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import VarlenBackend
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.reuse.blending import Blend, Selector
from engine.reuse.cachecraft import CacheCraft
from engine.reuse.placing import take
from engine.reuse.selectors import CacheBlend, Epic, Full, KvShare, Nothing, Random
from engine.reuse.trial import Trial
from engine.sampling import SamplingParams
from engine.sequence import Sequence
from tests.engine.blending import Chunks, Served, as_it_stands, from_elsewhere, row, some
from tests.engine.checkpoints import write
from tests.engine.test_attention import documented_varlen
from tests.engine.test_graphs import recompute

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SELECTORS: tuple[Selector, ...] = (
    Nothing(),
    Random(0.3),
    Epic(0.3),
    CacheBlend(((1, 0.3),)),
    CacheBlend(((0, 0.6), (1, 0.4), (2, 0.2)), "v"),
    KvShare(0.3),
    CacheCraft(0.5, focus=0.5),
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "window": ("mistral", {"sliding_window": 24}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
        },
    ),
}


def load(name: str, directory: Path) -> Checkpoint:
    family, changes = VARIANTS[name]
    write(directory, family, **changes)
    return load_checkpoint(directory, name=name, dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load("plain", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=["plain", "window"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(request.param, tmp_path_factory.mktemp(request.param))


@st.composite
def spans(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Up to three places for chunks, apart from each other; they may cover all of the prompt."""
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=6)))
    return list(zip(cuts[::2], cuts[1::2], strict=False))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Tokens, beginning in one of two ways, and where chunks stand; None: an ordinary one."""
    length = draw(st.integers(2, 70))
    head, tail = draw(st.integers(0, 40)), draw(st.integers(0, 5))
    tokens = (some(head, draw(st.integers(0, 1))) + some(70, 10 + tail))[:length]
    return tokens, draw(st.none() | spans(length))


mixes = st.lists(st.tuples(prompts(), st.integers(1, 3) | st.just(20)), min_size=1, max_size=5)
engines = st.fixed_dictionaries(
    {
        "blocks": st.integers(6, 16),
        "max_running": st.integers(1, 4),
        "token_budget": st.integers(4, 40) | st.just(512),
        "repairs": st.sampled_from([0, 0, 2]),
    }
)
modest = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def served(checkpoint: Checkpoint, rows: list[Sequence], engine: dict[str, int]) -> Served:
    serving = Served(checkpoint, **engine)  # type: ignore[arg-type]
    serving.add(*rows)
    for step in serving.run():
        assert sum(chunk.size for chunk in step.chunks) <= engine["token_budget"] * 5 // 4
        assert all(chunk.size >= 1 for chunk in step.chunks)
    for one in rows:
        serving.agrees(checkpoint, one)
    return serving


@modest
@given(mix=mixes, engine=engines)
def test_all_computed_is_an_ordinary_prefill(variant: Checkpoint, mix: Any, engine: dict[str, int]) -> None:
    rows = []
    for (tokens, places), answer in mix:
        chunks = None
        if places is not None:
            chunks = Chunks(from_elsewhere(variant, tokens, places), Full(), ranked=engine["repairs"] > 0)
        rows.append(row(tokens, answer, chunks))
    served(variant, rows, engine)


@modest
@given(mix=mixes, engine=engines, data=st.data())
def test_exact_chunks_give_an_ordinary_prefill(
    variant: Checkpoint, mix: Any, engine: dict[str, int], data: st.DataObject
) -> None:
    rows = []
    for (tokens, places), answer in mix:
        selector = data.draw(st.sampled_from(SELECTORS))
        chunks = None
        if places is not None:
            chunks = Chunks(as_it_stands(variant, tokens, places), selector, ranked=engine["repairs"] > 0)
        rows.append(row(tokens, answer, chunks))
    served(variant, rows, engine)


@modest
@given(mix=mixes, engine=engines, data=st.data())
def test_lost_chunks_are_computed(plain: Checkpoint, mix: Any, engine: dict[str, int], data: st.DataObject) -> None:
    """Whatever they would have brought; and others, whose chunks are exact, notice nothing."""
    rows = []
    for (tokens, places), answer in mix:
        selector, lost_at = data.draw(st.sampled_from(SELECTORS)), data.draw(st.sampled_from([None, 0, 1, 2]))
        chunks = None
        if places is not None:
            make = as_it_stands if lost_at is None else from_elsewhere
            chunks = Chunks(make(plain, tokens, places), selector, lost_at)
        rows.append(row(tokens, answer, chunks))
    serving = served(plain, rows, engine)
    assert all(one.reuse is not None and one.kept is None for one in serving.lost)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)
def test_what_a_preempted_one_had_is_placed_again(variant: Checkpoint, selector: Selector) -> None:
    serving = Served(variant, blocks=7, repairs=1)
    prompts = [some(44, seed) for seed in range(2)]
    chunks = [Chunks(as_it_stands(variant, tokens, [(3, 20), (22, 42)]), selector, ranked=True) for tokens in prompts]
    rows = [row(tokens, 30, its) for tokens, its in zip(prompts, chunks, strict=True)]
    serving.add(*rows)
    serving.run()
    assert rows[1].preemptions > 0
    assert chunks[1].calls.count("admitted") == chunks[1].calls.count("layer 0") == rows[1].preemptions + 1
    for one in rows:
        serving.agrees(variant, one)


def test_angles_that_depend_on_the_length(tmp_path: Path) -> None:
    checkpoint = load("dynamic", tmp_path)
    tokens = some(60, 1)
    prompt = as_it_stands(checkpoint, tokens, [(5, 40)])
    rows = [row(tokens, 1, Chunks(prompt, selector)) for selector in (Epic(0.3), CacheBlend(((1, 0.3),)))]
    rows.append(row(some(50, 2), 1))
    served(checkpoint, rows, {"token_budget": 16})


def elsewhere(checkpoint: Checkpoint) -> list[int]:
    return [*some(3, 99), *some(20, 1), *some(2, 98), *some(20, 2), *some(6, 97)]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)
def test_in_a_batch_selectors_give_what_they_give_alone(plain: Checkpoint, selector: Selector) -> None:
    tokens = elsewhere(plain)
    prompt = from_elsewhere(plain, tokens, [(3, 23), (25, 45)])
    other = from_elsewhere(plain, some(40, 7), [(4, 30)])
    trial, blend = Trial(plain, 128), Blend(prompt, selector)
    alone = trial.run(prompt, blend)
    one, two = row(tokens, 2, Chunks(prompt, selector)), row(some(40, 7), 2, Chunks(other, CacheBlend(((1, 0.2),))))
    serving, decoding = Served(plain), row(some(9, 3), 9)
    serving.add(decoding)
    serving.step()
    serving.add(row(some(30, 4), 2), two, one, row(some(20, 5), 2))
    step = serving.step()
    assert step is not None
    assert len(step.chunks) == 5
    torch.testing.assert_close(serving.scores[one][0], alone[0], atol=1e-4, rtol=0)
    left = torch.ones(len(tokens), dtype=torch.bool)
    left[blend.positions[-1]] = False
    assert one.kept is not None
    assert one.kept.tolist() == left.nonzero()[:, 0].tolist()
    serving.run()
    serving.agrees(plain, decoding)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)
def test_cut_into_pieces_the_share_computed_is_the_same(plain: Checkpoint, selector: Selector) -> None:
    tokens = elsewhere(plain)
    prompt = from_elsewhere(plain, tokens, [(3, 23), (25, 45)])
    whole, cut = (Chunks(prompt, selector) for _ in range(2))
    kept = []
    for chunks, budget in ((whole, 512), (cut, 10)):
        serving = Served(plain, token_budget=budget)
        one = row(tokens, 2, chunks)
        serving.add(one)
        while one.drawn == 0:
            serving.step()
        assert one.kept is not None
        assert (np.diff(one.kept) > 0).all()
        assert prompt.reused[one.kept].all()
        kept.append(len(one.kept))
        if not selector.checks:
            assert one.kept.tolist() == (prompt.reused & ~selector.choose(prompt)).nonzero()[:, 0].tolist()
    # A piece always goes on with its last token, and rounds its share up to one.
    assert kept[0] > 0
    if not isinstance(selector, CacheCraft):
        assert abs(kept[0] - kept[1]) <= 8


def test_only_what_is_computed_costs(plain: Checkpoint) -> None:
    tokens = some(100, 1)
    prompt = from_elsewhere(plain, tokens, [(4, 90)])
    serving = Served(plain, token_budget=8)
    serving.add(one := row(tokens, 2, Chunks(prompt, Nothing())))
    step = serving.step()
    assert step is not None
    assert [(chunk.start, chunk.count, chunk.size, chunk.draws) for chunk in step.chunks] == [(0, 94, 8, False)]
    assert step.chunks[0].rows is not None
    assert step.chunks[0].rows.tolist() == [0, 1, 2, 3, 90, 91, 92, 93]
    step = serving.step()
    assert step is not None
    assert [(chunk.start, chunk.count, chunk.rows, chunk.draws) for chunk in step.chunks] == [(94, 6, None, True)]
    assert one.kept is not None
    assert len(one.kept) == 86


def test_tenants_are_charged_for_what_is_computed(plain: Checkpoint) -> None:
    serving = Served(plain, max_running=1)
    one = SamplingParams(max_tokens=1)
    for seed in range(4):
        tokens = some(40, seed)
        chunks = Chunks(from_elsewhere(plain, tokens, [(2, 32)]), Nothing())
        serving.add(Sequence(tokens, one, tenant="chunks", salt="reuse", reuse=chunks))
    serving.add(*[Sequence(some(10, 10 + seed), one, tenant="plain") for seed in range(4)])
    assert [step.chunks[0].sequence.tenant for step in serving.run()] == ["chunks", "plain"] * 4


def test_a_prompt_may_be_all_chunk(plain: Checkpoint) -> None:
    """But for its last token; which is then all there is to compute, and no different from a token drawn."""
    tokens = some(50, 1)
    serving = Served(plain)
    serving.add(one := row(tokens, 3, Chunks(as_it_stands(plain, tokens, [(0, 50)]), Nothing())))
    step = serving.step()
    assert step is not None
    assert [chunk.size for chunk in step.chunks] == [1]
    serving.run()
    serving.agrees(plain, one)


def test_what_chunks_brought_is_not_found_by_exact_requests(plain: Checkpoint) -> None:
    tokens = some(64, 1)
    serving = Served(plain)
    serving.add(row(tokens, 1, Chunks(from_elsewhere(plain, tokens, [(0, 30), (32, 60)]), Nothing())))
    serving.run()
    assert serving.books.cached() == 4
    serving.add(exact := row(tokens, 4))
    serving.add(again := row(tokens, 1, Chunks(from_elsewhere(plain, tokens, [(0, 30)]), Nothing())))
    serving.run()
    assert (exact.cached, again.cached) == (0, 63)
    serving.agrees(plain, exact)


def test_chunks_want_a_salt_and_no_scores(plain: Checkpoint) -> None:
    chunks = Chunks(from_elsewhere(plain, some(9, 1), [(0, 5)]), Nothing())
    with pytest.raises(ValueError, match="with a salt"):
        Served(plain).add(Sequence(some(9, 1), SamplingParams(), reuse=chunks))
    with pytest.raises(ValueError, match="is scored"):
        Served(plain).add(Sequence(some(9, 1), SamplingParams(), salt="reuse", fresh=True, reuse=chunks))


def test_what_is_known_is_not_written_to(plain: Checkpoint) -> None:
    """A chunk that begins in a shared block: only what stands behind is placed."""
    head = some(32, 1)
    serving = Served(plain)
    serving.add(row(head, 1, Chunks(from_elsewhere(plain, head, [(0, 4)]), Full())))
    serving.run()
    tokens = [*head, *some(30, 2)]
    serving.add(one := row(tokens, 2, Chunks(from_elsewhere(plain, tokens, [(8, 40)]), Full())))
    serving.run()
    assert one.cached == 32
    serving.add(again := row([*head, *some(9, 3)], 2, Chunks(from_elsewhere(plain, head, [(0, 4)]), Full())))
    serving.run()
    assert again.cached == 32
    serving.agrees(plain, again)


def test_each_layer_is_placed_once_and_all_is_told(plain: Checkpoint) -> None:
    tokens = some(40, 1)
    chunks = Chunks(from_elsewhere(plain, tokens, [(4, 30)]), KvShare(0.2))
    serving = Served(plain, token_budget=8)
    serving.add(row(tokens, 3, chunks))
    serving.run()
    assert chunks.calls == ["admitted", "layer 0", "layer 1", "layer 2", "released"]


def documented(dtype: torch.dtype) -> AttentionBackend:
    return VarlenBackend(documented_varlen, SdpaBackend())


def interpreted(dtype: torch.dtype) -> AttentionBackend:
    module = pytest.importorskip("engine.attention.triton", reason="triton is not installed", exc_type=ImportError)
    backend = module.TritonBackend(heads=4, kv_heads=2, head_dim=16, dtype=dtype, device="cpu")
    return cast(AttentionBackend, backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are not interpreted")
@pytest.mark.parametrize("make", [documented, interpreted])
def test_with_the_backends_for_gpus(variant: Checkpoint, make: Callable[[torch.dtype], AttentionBackend]) -> None:
    serving = Served(variant, token_budget=24, backend=make(torch.float32))
    serving.add(decoding := row(some(5, 9), 8))
    serving.step()
    tokens = [some(50, 1), some(40, 2), some(30, 3)]
    spans = [(3, 20), (22, 38)]
    rows = [
        row(tokens[0], 3, Chunks(as_it_stands(variant, tokens[0], spans), Epic(0.3))),
        row(tokens[1], 3, Chunks(as_it_stands(variant, tokens[1], [(0, 40)]), Nothing())),
        row(tokens[2], 3, Chunks(as_it_stands(variant, tokens[2], [(4, 25)]), CacheBlend(((1, 0.3),)))),
        decoding,
    ]
    serving.add(*rows[:3])
    serving.run()
    for one in rows:
        serving.agrees(variant, one)


def test_captured_steps_are_those_without_chunks(plain: Checkpoint) -> None:
    """A prompt that is all chunk has one token to compute, and chunks to place all the same."""
    tokens = some(50, 1)
    serving = Served(plain, backend=interpreted(torch.float32))
    serving.executor.capture(4, recompute)
    serving.add(one := row(tokens, 3, Chunks(as_it_stands(plain, tokens, [(0, 50)]), Nothing())), row(some(2, 1), 3))
    serving.run()
    serving.agrees(plain, one)


def test_a_source_that_breaks_is_a_lost_chunk(plain: Checkpoint) -> None:
    class Broken(Chunks):
        def layer(self, index: int) -> list[torch.Tensor | None]:
            raise OSError("gone")

    tokens = some(40, 1)
    serving = Served(plain)
    serving.add(one := row(tokens, 3, Broken(from_elsewhere(plain, tokens, [(4, 30)]), Nothing())))
    serving.run()
    assert serving.lost == [one]
    serving.agrees(plain, one)


def test_repairs_make_it_exact_in_the_end(plain: Checkpoint) -> None:
    """Behind a head that is exact, a chunk repaired from its first token on is what it would have been."""
    tokens = some(40, 1)
    exact = Trial(plain, 128)
    exact.compute(tokens, 1)
    wanted = exact.taken(tokens, 5, 30)
    serving = Served(plain, repairs=4)
    one = row(tokens, 12, Chunks(from_elsewhere(plain, tokens, [(5, 30)]), Nothing()))
    serving.add(one, row(some(20, 2), 12))
    sizes = []
    while one.drawn < 9:
        step = serving.step()
        assert step is not None
        sizes.append(next(chunk.size for chunk in step.chunks if chunk.sequence is one))
    assert sizes == [15, 5, 5, 5, 5, 5, 5, 2, 1]
    slots = serving.executor.slots(one, np.arange(5, 30))
    found = take(serving.executor.pool, slots, plain.model.rope, 5, 40)
    for ours, theirs in zip(found, wanted.layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_repairs_leave_shared_blocks_alone(plain: Checkpoint) -> None:
    tokens = some(40, 1)
    chunks = Chunks(from_elsewhere(plain, tokens, [(5, 30)]), Nothing())
    serving = Served(plain, repairs=4)
    parent = row(tokens, 12, chunks)
    child = Sequence(tokens, SamplingParams(max_tokens=12), salt="reuse", parent=parent)
    serving.add(parent, child)
    serving.step()
    for _ in range(4):
        step = serving.step()
        assert step is not None
        assert [chunk.size for chunk in step.chunks] == [1, 1]
    serving.run()


def repaired_rows(serving: Served, one: Sequence) -> list[list[int]]:
    """Of every step that draws a token behind the first, what else it computed."""
    found = []
    while (step := serving.step()) is not None:
        for chunk in step.chunks:
            if chunk.sequence is one and chunk.start >= len(one.prompt):
                rows = [chunk.start] if chunk.rows is None else chunk.rows.tolist()
                assert rows == sorted(rows)
                assert rows[-1] == chunk.start
                found.append(rows[:-1])
    return found


@pytest.mark.parametrize(
    "selector", [KvShare(0.2), CacheBlend(((1, 0.4), (2, 0.2)))], ids=lambda one: type(one).__name__
)
def test_those_missed_most_are_repaired_first(plain: Checkpoint, selector: Selector) -> None:
    """In the order that a look at all of the prompt gives; computed alone, not in a step with others."""
    tokens = elsewhere(plain)
    prompt = from_elsewhere(plain, tokens, [(3, 23), (25, 45)])
    blend = Blend(prompt, selector, ranked=True)
    Trial(plain, 128).run(prompt, blend)
    wanted = blend.repairs.tolist()
    assert sorted(wanted) != wanted
    serving = Served(plain, repairs=3)
    one = row(tokens, 30, Chunks(prompt, selector, ranked=True))
    serving.add(one, row(some(20, 2), 9))
    serving.step()
    assert one.kept is not None
    assert one.kept.tolist() == sorted(wanted)
    found = repaired_rows(serving, one)
    assert found[: len(wanted) // 3] == [sorted(wanted[at : at + 3]) for at in range(0, len(wanted) // 3 * 3, 3)]
    assert sorted(at for rows in found for at in rows) == sorted(wanted)  # each once
    assert serving.scheduler.repaired == len(wanted)


def test_where_nobody_says_what_is_missed_the_first_are_repaired_first(plain: Checkpoint) -> None:
    tokens = elsewhere(plain)
    prompt = from_elsewhere(plain, tokens, [(3, 23), (25, 45)])
    for chunks in (Chunks(prompt, Epic(0.3), ranked=True), Chunks(prompt, KvShare(0.2))):
        serving = Served(plain, repairs=5)
        serving.add(one := row(tokens, 12, chunks))
        serving.step()
        assert one.kept is not None
        kept = one.kept.tolist()
        assert repaired_rows(serving, one)[:4] == [kept[at : at + 5] for at in range(0, 20, 5)]


def test_a_prompt_in_pieces_is_ranked_as_a_whole(plain: Checkpoint) -> None:
    tokens = elsewhere(plain)
    chunks = Chunks(from_elsewhere(plain, tokens, [(3, 23), (25, 45)]), KvShare(0.2), ranked=True)
    serving = Served(plain, repairs=4, token_budget=12)
    serving.add(one := row(tokens, 14, chunks))
    while not one.drawn:
        serving.step()
    assert one.kept is not None
    assert one.missed is not None
    kept, missed = one.kept, one.missed.copy()
    assert np.isfinite(missed[kept]).all()
    found = [at for rows in repaired_rows(serving, one) for at in rows]
    assert sorted(found) == kept.tolist()
    assert set(found[:4]) == set(kept[np.argsort(-missed[kept], kind="stable")][:4].tolist())
    assert one.missed is None


@pytest.mark.parametrize("selector", [Nothing(), KvShare(0.2)], ids=lambda selector: type(selector).__name__)
def test_all_repaired_at_once_is_all_computed(plain: Checkpoint, selector: Selector) -> None:
    """Keys and values of the chunks are from then on those of an ordinary prefill."""
    tokens = some(40, 1)
    exact = Trial(plain, 128)
    exact.compute(tokens, 1)
    wanted = exact.taken(tokens, 5, 30)
    serving = Served(plain, repairs=100)
    one = row(tokens, 12, Chunks(from_elsewhere(plain, tokens, [(5, 30)]), selector, ranked=True))
    serving.add(one)
    for _ in range(2):
        serving.step()
    slots = serving.executor.slots(one, np.arange(5, 30))
    found = take(serving.executor.pool, slots, plain.model.rope, 5, 40)
    for ours, theirs in zip(found, wanted.layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_with_repairs_answers_end_nearer_to_full_computing(plain: Checkpoint) -> None:
    """Measured over the last tokens of an answer, the same ones whatever was repaired; over several prompts."""
    losses = {0: 0.0, 2: 0.0, 7: 0.0}
    for seed in range(4):
        tokens = [*some(3, 99), *some(20, seed), *some(2, 98), *some(20, 10 + seed), *some(6, 97)]
        for repairs in losses:
            chunks = Chunks(from_elsewhere(plain, tokens, [(3, 23), (25, 45)]), KvShare(0.1), ranked=True)
            serving = Served(plain, repairs=repairs)
            serving.add(one := row(tokens, 16, chunks))
            serving.run()
            exact = Trial(plain, 128).compute(one.tokens[:-1], 4).log_softmax(-1)
            ours = torch.stack(serving.scores[one][-4:]).log_softmax(-1)
            losses[repairs] += float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert losses[7] < losses[2] < losses[0]
    assert losses[7] < 0.5 * losses[0]
