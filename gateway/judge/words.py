"""The embedder's table of words, read where it lies: 47 MB of float32, of which a question touches a few kilobytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TABLE = "embeddings.word_embeddings.weight"


def word_table(path: Path) -> NDArray[np.float32]:
    """Map the table of a safetensors file, [vocabulary, width]. Raises ValueError when it is not there, OSError."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > path.stat().st_size - 8:
            raise ValueError(f"{path}: the header is longer than the file")
        entry = json.loads(file.read(length)).get(TABLE)
    if entry is None or entry["dtype"] != "F32":
        raise ValueError(f"{path}: there is no float32 {TABLE}")
    start, _ = entry["data_offsets"]
    table: NDArray[np.float32] = np.asarray(
        np.memmap(path, np.float32, "r", offset=8 + length + start, shape=tuple(entry["shape"]))
    )
    return table
