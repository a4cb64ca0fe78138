"""The values that cross the store's door."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
"""One embedding: shape [dim], float32, unit length."""


@dataclass(frozen=True, slots=True)
class Document:
    """A complete answer on its way into the store."""

    key: bytes
    """Exact key, 16 bytes."""
    scope: bytes
    """Scope fingerprint, 16 bytes; empty when the call may never be compared by meaning."""
    namespace: str
    category: str
    model: str
    endpoint: str
    """`chat`, `completions`, `embeddings` or `responses`."""
    upstream: str
    text: str
    """The text that is compared by meaning (the last user turn); kept for operators and judges."""
    body: bytes
    """The complete, non-streamed answer as JSON."""
    created: float
    """Unix seconds."""
    expires: float
    """Unix seconds; the entry is never served later unless a caller asks for a grace."""
    cost: float
    """Seconds that generating took: what a hit saves."""
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A stored answer, ready to serve."""

    id: int
    body: bytes
    created: float
    expires: float
    category: str
    endpoint: str
    upstream: str
    text: str
    cost: float
    """Seconds that generating took."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One result of a search by meaning, most similar first."""

    id: int
    similarity: float
    """Cosine, -1 … 1."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which entries an operator means; the parts are combined with *and*, an empty filter means all."""

    category: str | None = None
    namespace: str | None = None
    """A tenant's namespace, with those inside it (`acme` means `acme/team-a` too)."""
    model: str | None = None
    contains: str | None = None
    """Part of the compared text or of the answer, case-insensitive."""
    ids: tuple[int, ...] = ()
