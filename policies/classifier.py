"""Which category a question belongs to, told from its embedding: a small network, trained once, shipped as weights.

How it was trained and what it was measured at stands in `category_head.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FILE = Path(__file__).with_name("category_head.npz")


@dataclass(frozen=True, slots=True)
class CategoryHead:
    """One hidden layer over a unit vector; pure arithmetic, about 20 µs a question."""

    labels: tuple[str, ...]
    embedder: str
    """The model whose vectors it was trained on: the first part of an embedder's identity."""
    hidden: NDArray[np.float32]
    """Shape [dim, units]."""
    hidden_bias: NDArray[np.float32]
    """Shape [units]."""
    out: NDArray[np.float32]
    """Shape [units, labels]."""
    out_bias: NDArray[np.float32]
    """Shape [labels]."""

    @classmethod
    def load(cls, path: Path = _FILE) -> CategoryHead:
        """Read the weights that ship with the package, or another file of the same make. Raises OSError, ValueError."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(
                labels=tuple(str(label) for label in stored["labels"]),
                embedder=str(stored["embedder"]),
                hidden=stored["hidden"].astype(np.float32),
                hidden_bias=stored["hidden_bias"].astype(np.float32),
                out=stored["out"].astype(np.float32),
                out_bias=stored["out_bias"].astype(np.float32),
            )

    def fits(self, identity: str) -> bool:
        """Whether an embedder of this identity makes the vectors that the head understands."""
        return identity.split("/", 1)[0] == self.embedder

    def probabilities(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probability of each label for vectors of shape [..., dim]; shape [..., labels]."""
        scores = np.maximum(vectors @ self.hidden + self.hidden_bias, 0) @ self.out + self.out_bias
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        result: NDArray[np.float32] = powers / powers.sum(-1, keepdims=True)
        return result

    def classify(self, vector: NDArray[np.float32]) -> tuple[str, float]:
        """The likeliest category of one vector, shape [dim], and its probability."""
        shares = self.probabilities(vector)
        best = int(shares.argmax())
        return self.labels[best], float(shares[best])
