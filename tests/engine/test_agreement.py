"""Answers are those of transformers, whatever else is computed with them: other prompts, chunks, hits, preemptions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.executor import BLOCK_SIZE, Executor
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.engine import checkpoints
from tests.engine.test_families import CASES

STEPS = 64
PREFIX = [(i * 37) % 256 for i in range(3 * BLOCK_SIZE)]
PROMPTS = (
    [*PREFIX[:40], 9],
    [*PREFIX[:40], 77, 3, 5],
    PREFIX,
    [*PREFIX, *range(60, 90)],
    [5],
    list(range(20, 37)),
)
"""Some begin alike, one is a whole number of blocks, one is a single token."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint of ours, and what transformers makes of the prompts: tokens and the scores they were taken from."""

    checkpoint: Checkpoint
    tokens: list[list[int]]
    scores: list[Tensor]


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    family, changed = CASES[request.param]
    directory = tmp_path_factory.mktemp("model")
    model = checkpoints.write(directory, family, **changed)
    tokens, scores = [], []
    for prompt in PROMPTS:
        # A copy, because dynamic rotary frequencies of transformers remember the longest text so far.
        made = copy.deepcopy(model).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=257,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(made.sequences[0, len(prompt) :].tolist())
        scores.append(torch.cat(made.logits))
    return Reference(load_checkpoint(directory, name="m", dtype="float32"), tokens, scores)


mixes = st.fixed_dictionaries(
    {
        "order": st.permutations(range(len(PROMPTS))).flatmap(
            lambda order: st.lists(st.sampled_from(order), min_size=1, max_size=7)
        ),
        "budget": st.integers(8, 96),
        "blocks": st.integers(-(-(max(map(len, PROMPTS)) + STEPS) // BLOCK_SIZE) + 1, 40),
        "together": st.integers(1, 8),
        "stretch": st.integers(0, 20),
        "cancelled": st.sets(st.integers(0, 6), max_size=2),
    }
)


@given(mix=mixes)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@torch.inference_mode()
def test_every_mix_gives_the_same_answers(reference: Reference, mix: dict[str, Any]) -> None:
    rows = run(reference.checkpoint, **mix)
    for index, row, scores in rows:
        made, expected = row.tokens[len(row.prompt) :], reference.tokens[index]
        assert made == expected[: len(made)]
        assert (torch.stack(scores) - reference.scores[index][: len(scores)]).abs().max() < 1e-4


def run(
    checkpoint: Checkpoint, order: list[int], budget: int, blocks: int, together: int, stretch: int, cancelled: set[int]
) -> list[tuple[int, Sequence, list[Tensor]]]:
    """Compute these prompts; `stretch` steps lie between two arrivals. The scores behind each row's tokens."""
    books = BlockManager(blocks, BLOCK_SIZE, root=b"test")
    scheduler = Scheduler(books, max_running=together, max_waiting=100, token_budget=budget, patience=1000.0)
    executor = Executor(checkpoint, SdpaBackend(), blocks=blocks, context=256)
    rows: list[tuple[int, Sequence, list[Tensor]]] = []
    waiting, now = list(order), 0
    while waiting or scheduler.depth() != (0, 0):
        if waiting and now % (stretch + 1) == 0:
            index = waiting.pop()
            params = SamplingParams(max_tokens=STEPS)
            stretched = checkpoint.model.rope.stretches and len(PROMPTS[index]) > checkpoint.config.max_positions
            row = Sequence(PROMPTS[index], params, salt=str(len(PROMPTS[index])) if stretched else "")
            rows.append((index, row, []))
            scheduler.add([row], float(now))
        now += 1
        step = scheduler.schedule(float(now))
        if step is None:
            continue
        for row in step.preempted:
            executor.forget(row)
        executor.copy(step.copies)
        scores = executor.run(step.chunks).scores
        drawing = [chunk.sequence for chunk in step.chunks if chunk.draws]
        of = {row: kept for _, row, kept in rows}
        for row, score in zip(drawing, scores, strict=True):
            of[row].append(score)
        scheduler.complete(step, dict(zip(drawing, scores.argmax(-1).tolist(), strict=True)))
        for number, (_, row, _) in enumerate(rows):
            if row in drawing and (row.drawn == STEPS or (number in cancelled and row.drawn > 10)):
                scheduler.finish(row)
                executor.forget(row)
        scheduler.check()
    assert books.used() == 0
    return rows
