"""Answers in memory: whatever was just stored or hit, as long as there is room for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from sys import getsizeof

from cachestore.entry import Hit

HOT_BYTES = 600
"""What a hot body costs beside its bytes and its text."""


class HotBody:
    """A body, with the hits that were not counted yet and the mark that saves it once from eviction."""

    __slots__ = ("hit", "hits", "used")

    def __init__(self, hit: Hit) -> None:
        self.hit = hit
        self.hits = 0
        self.used = False

    @property
    def bytes(self) -> int:
        """What it costs to keep."""
        return len(self.hit.body) + getsizeof(self.hit.text) + HOT_BYTES


class HotBodies:
    """Bodies by key, in second-chance order: one that was hit since it was last looked at is passed over once."""

    def __init__(self) -> None:
        self._bodies: OrderedDict[bytes, HotBody] = OrderedDict()
        self.get = self._bodies.get
        """Lookup without a word of Python in between: this is the fastest path of the house."""
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._bodies)

    def __iter__(self) -> Iterator[tuple[bytes, HotBody]]:
        return iter(self._bodies.items())

    def add(self, key: bytes, hit: Hit) -> HotBody:
        """Keep a body, in the place of an older one of the same key."""
        self.remove(key)
        body = self._bodies[key] = HotBody(hit)
        self.bytes += body.bytes
        return body

    def remove(self, key: bytes) -> HotBody | None:
        """Forget a body."""
        body = self._bodies.pop(key, None)
        if body is not None:
            self.bytes -= body.bytes
        return body

    def trim(self, limit: int) -> list[tuple[bytes, HotBody]]:
        """Give bodies up until no more than `limit` bytes are held; returns them, for their hits."""
        given_up = []
        while self.bytes > max(limit, 0) and self._bodies:
            key, body = self._bodies.popitem(last=False)
            if body.used:
                body.used = False
                self._bodies[key] = body
                continue
            self.bytes -= body.bytes
            given_up.append((key, body))
        return given_up
