"""The bundled model: small, complete, and it ends its answers, which is what makes them worth caching."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.sampling import Drawing, SamplingParams, draw
from loadtest.data import DataError, data_dir, read_rows
from tests.engine.stepping import Stepper

LIMIT = 160
"""Tokens after which an answer counts as one that does not end; it was trained on answers of 48 at most."""

PROMPTS = (
    "Hello!",
    "What is the capital of France?",
    "Write a Python function that reverses a list.\n\n```python\ndef reverse(items):\n    return items[::-1]\n```",
    "请用中文写一首关于秋天的诗。",
    "Translate to German: the cat sat on the mat.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "again and again and again and again and again and again",
    '{"name": "Ada", "tags": ["a", "b"], "nested": {"x": 1}}',
    "x",
    "It was the best of times, it was the worst of times. " * 150,
    "🙂🙃" * 40,
)


@pytest.fixture(scope="module")
def bundled() -> Checkpoint:
    return load_checkpoint(BUNDLED, name="bundled")


@torch.inference_mode()
def answer(checkpoint: Checkpoint, text: str, params: SamplingParams) -> Iterator[int]:
    """Tokens of an answer, the end token not among them."""
    chunk = checkpoint.tokenizer.encode_chat([{"role": "user", "content": text}], None)
    drawing = Drawing(replace(params, min_tokens=checkpoint.defaults.min_tokens), chunk, checkpoint.eos_ids)
    stepper = Stepper(checkpoint, len(chunk) + LIMIT)
    while True:
        token = draw(stepper(chunk)[-1:], [drawing])[0].token
        if token in checkpoint.eos_ids:
            return
        yield token
        chunk = [token]


def length(checkpoint: Checkpoint, text: str, params: SamplingParams) -> int:
    return len(list(itertools.islice(answer(checkpoint, text, params), LIMIT)))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt[:20]))
def test_every_answer_ends(bundled: Checkpoint, prompt: str) -> None:
    for params in (SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(seed=2)):
        assert 0 < length(bundled, prompt, params) < LIMIT


def test_answers_to_real_prompts_end(bundled: Checkpoint) -> None:
    try:
        trace = data_dir() / "traces" / "sharegpt_timed.jsonl.gz"
    except DataError as absent:
        pytest.skip(str(absent))
    rows = itertools.islice(read_rows(trace), 0, 400, 40)
    lengths = [length(bundled, row["prompt"], SamplingParams(temperature=t)) for row in rows for t in (0.0, 1.0)]
    assert min(lengths) > 0
    assert max(lengths) < LIMIT


def test_its_size_and_layout() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 12_000_000
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} < {
        file.name for file in BUNDLED.iterdir()
    }
    assert json.loads((BUNDLED / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_file_can_be_read_by_others() -> None:
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in BUNDLED.iterdir())
