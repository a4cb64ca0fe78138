"""Decoded chunks on the model's device: the tier above the store, bounded, the least recently used go first.

Of a text there may be several refined versions, each from another context; they go together.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from engine.reuse.cachecraft import unfit
from engine.reuse.chunks import ChunkKv
from engine.reuse.known import Text


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A chunk, and whether it is a refined version."""

    chunk: ChunkKv
    refined: bool
    slot: int = 0
    """Which of the refined ones."""

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
        self._chunks: OrderedDict[Text, dict[int, Held]] = OrderedDict()
        """By text and slot: refined versions, or one that is not."""
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes held."""
        return self._used

    def __len__(self) -> int:
        return sum(map(len, self._chunks.values()))

    def get(self, text: Text, prefix: Sequence[bytes] = ()) -> Held | None:
        """The version that is best behind the texts of these names; they all count as used."""
        with self._lock:
            versions = self._chunks.get(text)
            if versions is None:
                return None
            self._chunks.move_to_end(text)
            return min(versions.values(), key=lambda held: unfit(held.chunk.context, prefix))

    def put(self, text: Text, held: Held) -> list[Text]:
        """Take it in, in place of worse versions; texts that had to go for it, or its own where it is too large."""
        with self._lock:
            before = self._chunks.get(text, {})
            refined = {slot: one for slot, one in before.items() if one.refined}
            if refined and not held.refined:
                return []
            if held.size > self._capacity:
                return [] if before else [text]
            self._take_out(text)
            self._chunks[text] = versions = {**refined, held.slot: held}
            self._used += sum(one.size for one in versions.values())
            gone = []
            while self._used > self._capacity:
                gone.append(next(iter(self._chunks)))
                self._take_out(gone[-1])
            return gone

    def check(self) -> list[str]:
        """What does not add up; empty is good."""
        with self._lock:
            total = sum(held.size for versions in self._chunks.values() for held in versions.values())
        return [] if total == self._used <= self._capacity else [f"{total} bytes are hot, {self._used} are counted"]

    def _take_out(self, text: Text) -> None:
        self._used -= sum(held.size for held in self._chunks.pop(text, {}).values())
