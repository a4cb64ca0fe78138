"""Decoded chunks on the model's device: the tier above the store, bounded, the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from engine.reuse.chunks import ChunkKv
from engine.reuse.known import Text


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A chunk, and whether it is the refined version."""

    chunk: ChunkKv
    refined: bool

    @property
    def size(self) -> int:
        """Bytes of its keys and values."""
        return size_of(self.chunk)


def size_of(chunk: ChunkKv) -> int:
    """Bytes of a chunk's keys and values."""
    return sum(layer.numel() * layer.element_size() for layer in chunk.layers)


class Hot:
    """Any thread may call."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes."""
        self._capacity = capacity
        self._lock = threading.Lock()
        self._chunks: OrderedDict[Text, Held] = OrderedDict()
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes held."""
        return self._used

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, text: Text) -> Held | None:
        """The best version that is here; it counts as used."""
        with self._lock:
            held = self._chunks.get(text)
            if held is not None:
                self._chunks.move_to_end(text)
            return held

    def put(self, text: Text, held: Held) -> list[Text]:
        """Take it in, in place of a worse version; what had to go for it, or itself where it is too large."""
        with self._lock:
            before = self._chunks.get(text)
            if before is not None and before.refined and not held.refined:
                return []
            if held.size > self._capacity:
                return [text] if before is None else []
            self._take_out(text)
            self._chunks[text] = held
            self._used += held.size
            gone = []
            while self._used > self._capacity:
                gone.append(next(iter(self._chunks)))
                self._take_out(gone[-1])
            return gone

    def check(self) -> list[str]:
        """What does not add up; empty is good."""
        with self._lock:
            total = sum(held.size for held in self._chunks.values())
        return [] if total == self._used <= self._capacity else [f"{total} bytes are hot, {self._used} are counted"]

    def _take_out(self, text: Text) -> None:
        if (held := self._chunks.pop(text, None)) is not None:
            self._used -= held.size
