"""Logits and greedy answers agree with transformers, in one go and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load_checkpoint
from tests.engine import checkpoints
from tests.engine.checkpoints import edit
from tests.engine.stepping import Stepper

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, every head its own keys": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}}),
    "llama dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_agrees_with_the_reference(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    model = checkpoints.write(tmp_path, family, **settings)
    loaded = load_checkpoint(tmp_path, name="m", dtype="float32")
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    prompt, total = 10, ids.shape[1]

    at_once = Stepper(loaded, total)(ids[0].tolist(), span=total)
    assert (at_once - model(ids).logits[0]).abs().max() < 1e-4

    # The prompt in two chunks, then token by token, after the reference had the prompt in one.
    stepper = Stepper(loaded, total)
    chunks = [stepper(ids[0, start:end].tolist(), span=prompt) for start, end in ((0, 6), (6, prompt))]
    expected = model(ids[:, :prompt], use_cache=True)
    assert (torch.cat(chunks) - expected.logits[0]).abs().max() < 1e-4
    for end in range(prompt + 1, total + 1):
        expected = model(ids[:, end - 1 : end], cache=expected.cache, use_cache=True)
        assert (stepper(ids[0, end - 1 : end].tolist()) - expected.logits[0]).abs().max() < 1e-4


def test_shards_and_the_older_rope_layout_load_alike(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    checkpoints.write(new, rope_parameters=LLAMA3)
    checkpoints.write(old, rope_parameters=LLAMA3, shard="40KB")
    assert len(list(old.glob("model-*.safetensors"))) > 1

    def as_before(config: dict[str, Any]) -> None:
        scaling = config.pop("rope_parameters")
        config["rope_theta"] = scaling.pop("rope_theta")
        config["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}

    edit(old / "config.json", as_before)
    first, second = (load_checkpoint(d, name="m") for d in (new, old))
    assert first.config == second.config
    assert torch.equal(Stepper(first, 40)(list(range(40))), Stepper(second, 40)(list(range(40))))


def test_half_precision_stays_close(tmp_path: Path) -> None:
    checkpoints.write(tmp_path)
    exact, half = (load_checkpoint(tmp_path, name="m", dtype=d) for d in ("float32", "bfloat16"))
    ids = list(range(20))
    difference = (Stepper(exact, 20)(ids) - Stepper(half, 20)(ids).float()).abs().mean()
    assert half.model.weights.norm.dtype == torch.bfloat16
    assert difference < 0.1
