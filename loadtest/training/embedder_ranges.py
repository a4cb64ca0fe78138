"""Measure how large the embedder's activations get: `python -m loadtest.training.embedder_ranges`.

Writes `gateway/embedding/minilm_ranges.npz`: for every activation that is quantised, the smallest and largest value per
channel over a sample of the category prompts. Only these numbers ship, no text.
"""

from __future__ import annotations

import random

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gateway.embedding.build import RANGES_FILE, read_safetensors, watched
from gateway.embedding.local import find_model
from gateway.embedding.minilm import WINDOW, feeds
from loadtest.data import data_dir, read_rows

SAMPLE = 600
SEED = 7


def main() -> None:
    """Run the float32 model over the sample and keep the extremes."""
    source = find_model()
    model, names = watched(read_safetensors(source / "model.safetensors"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(WINDOW)
    rows = [row["text"] for row in read_rows(data_dir() / "prompts" / "categories.jsonl.gz")]
    ranges: dict[str, NDArray[np.float32]] = {}
    for text in sample(rows):
        _, *activations = session.run(None, feeds([tokenizer.encode(text).ids]))
        for name, activation in zip(names, activations, strict=True):
            _widen(ranges, name, activation.reshape(-1, activation.shape[-1]))
    np.savez_compressed(RANGES_FILE, **{name: value.astype(np.float16) for name, value in ranges.items()})  # type: ignore[arg-type]
    print(f"{RANGES_FILE}: {len(ranges)} activations")


def sample(rows: list[str]) -> list[str]:
    """Single prompts, prompts strung together until they fill the window, and next to nothing."""
    single = random.Random(SEED).sample(rows, SAMPLE)
    filled = [" ".join(single[start : start + 30]) for start in range(0, SAMPLE, 30)]
    return [*single, *filled, "", "?", "hi"]


def _widen(ranges: dict[str, NDArray[np.float32]], name: str, rows: NDArray[np.float32]) -> None:
    low, high = rows.min(0), rows.max(0)
    if name in ranges:
        low, high = np.minimum(low, ranges[name][0]), np.maximum(high, ranges[name][1])
    ranges[name] = np.stack([low, high])


if __name__ == "__main__":
    main()
