"""Texts to vectors: one protocol, a local and a remote implementation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from cachestore.entry import Vector

# onnxruntime keeps a device id and a database of events below the home directory unless it is told not to, and it reads
# this only once, when it is imported. A gateway does not report on its users.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an embedder says of one text."""

    vector: Vector
    truncated: bool
    """The text did not fit the model's window or holds words the model does not know (another script, emoji):
    the vector speaks of a part of it only, and texts that differ in the rest would look the same."""


class EmbedderError(Exception):
    """The text could not be embedded; the call goes on as a miss."""


class Embedder(Protocol):
    """Turns texts into unit vectors, off the event loop."""

    identity: str
    """Names model, weights and quantisation; part of every scope, so that vectors of two models never meet."""
    dim: int

    async def embed(self, text: str) -> Embedding:
        """Embed one text; concurrent calls share a batch. Raises EmbedderError."""
        ...

    async def close(self) -> None:
        """Release the model or the connections."""
        ...
