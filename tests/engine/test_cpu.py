"""Laying weights out for the CPU changes where they lie, not what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint import load_checkpoint
from engine.cpu import lay_out
from engine.ops import PlainOps, padded
from tests.engine import checkpoints
from tests.engine.stepping import Stepper


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
@torch.inference_mode()
def test_laid_out_weights_give_the_same_logits(settings: dict[str, Any], tmp_path: Path) -> None:
    checkpoints.write(tmp_path, **settings)
    plain, laid_out = (load_checkpoint(tmp_path, name="m", dtype="bfloat16") for _ in range(2))
    lay_out(laid_out.model)
    for ids in ([5], list(range(30))):
        expected, found = (Stepper(each, 40)(ids).float() for each in (plain, laid_out))
        assert (found - expected).norm() / expected.norm() < 0.03


def test_float32_stays_as_it_is(tmp_path: Path) -> None:
    checkpoints.write(tmp_path)
    exact = load_checkpoint(tmp_path, name="m", dtype="float32")
    before = exact.model.weights
    lay_out(exact.model)
    assert exact.model.weights is before
    assert type(exact.model.ops) is PlainOps


@given(st.integers(1, 100_000))
def test_numbers_of_rows_are_few_and_hardly_more_than_needed(rows: int) -> None:
    assert rows <= padded(rows) <= rows * 1.125
    assert padded(padded(rows)) == padded(rows)


def test_a_token_budget_meets_few_programs() -> None:
    assert len({padded(rows) for rows in range(1, 513)}) <= 56
