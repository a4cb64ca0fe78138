"""Checkpoints with random weights: the speed of a model depends on its shape, not on what it learned."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

from engine.checkpoint import BUNDLED

SHAPES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        # For tests: shows that a measurement works.
        "tiny": {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        # The layers of Qwen2.5-0.5B, a third of them, and a smaller vocabulary: runs in minutes on two cores.
        "small": {
            "vocab_size": 32_768,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 8,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        "qwen2.5-0.5b": {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    }
)
_CONTEXT = 32_768


def write_shape(name: str, directory: Path) -> Path:
    """Write the checkpoint of a shape below `directory`, with the bundled tokenizer; returns its folder."""
    sizes: dict[str, Any] = dict(SHAPES[name])
    config = transformers.Qwen2Config(
        **sizes,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    target = directory / name
    transformers.Qwen2ForCausalLM(config).save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, target / file)
    return target
