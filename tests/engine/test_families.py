"""Logits and greedy answers agree with transformers, in one go and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.model import ContiguousCache
from tests.engine import checkpoints
from tests.engine.checkpoints import edit

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

    at_once = loaded.model.logits(loaded.model(ids, torch.arange(total)[None]))
    assert (at_once - model(ids).logits).abs().max() < 1e-4

    # The prompt in two chunks, then token by token; the reference with its own cache, split the same way.
    cache = ContiguousCache(loaded.config, total, dtype=torch.float32, device=torch.device("cpu"))
    past, start = None, 0
    for end in (6, *range(prompt, total + 1)):
        chunk, positions = ids[:, start:end], torch.arange(start, end)[None]
        stepped = loaded.model.logits(loaded.model(chunk, positions, cache))
        expected = model(chunk, past_key_values=past, use_cache=True)
        past, start = expected.past_key_values, end
        assert (stepped - expected.logits).abs().max() < 1e-4


@torch.inference_mode()
def test_greedy_tokens_are_those_of_the_reference(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path, "qwen3")
    loaded = load_checkpoint(tmp_path, name="m")
    prompt = list(b"Call me Ishmael.")
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=257
    )
    cache = ContiguousCache(loaded.config, 64, dtype=torch.float32, device=torch.device("cpu"))
    chunk, made = prompt, list[int]()
    for _ in range(40):
        start = len(prompt) + len(made) - len(chunk)
        positions = torch.arange(start, start + len(chunk))[None]
        hidden = loaded.model(torch.tensor([chunk]), positions, cache)
        made.append(int(loaded.model.logits(hidden[0, -1]).argmax()))
        chunk = [made[-1]]
    assert made == expected[0, len(prompt) :].tolist()


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
    ids, positions = torch.arange(40)[None], torch.arange(40)[None]
    first, second = (load_checkpoint(d, name="m") for d in (new, old))
    assert first.config == second.config
    assert torch.equal(first.model(ids, positions), second.model(ids, positions))


def test_half_precision_stays_close(tmp_path: Path) -> None:
    checkpoints.write(tmp_path)
    exact, half = (load_checkpoint(tmp_path, name="m", dtype=d) for d in ("float32", "bfloat16"))
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    difference = (exact.model(ids, positions) - half.model(ids, positions).float()).abs().mean()
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert difference < 0.1
