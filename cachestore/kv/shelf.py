"""Where bytes are kept: the protocol that every shelf keeps to, and the one that keeps them in this process's memory.

A shelf holds blobs. Blob 0 of a key is the chunk's head, the others are its parts. It decides nothing: what is kept,
for whom and whether it may be used is the store's business (`cachestore.kv.store`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cachestore.kv.ledger import Key


class Tier(StrEnum):
    """Where something was found."""

    MEMORY = "memory"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where to keep things."""

    memory: int
    """Bytes of this machine's memory."""
    directory: Path | None = None
    """Where files go; each model gets a folder of its own in it."""
    redis: str | None = None
    """As `redis://host:port/db`."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One thing to fetch."""

    key: Key
    index: int
    size: int
    """Bytes that it must have; one of another size counts as absent."""


class Ticket(Protocol):
    """A blob on its way. Once it is there it stays, and its bytes with it, until `release`."""

    def done(self, timeout: float = 0.0) -> bool:
        """Whether it is known what came; waits up to `timeout` seconds for that."""
        ...

    def code(self) -> Tensor | None:
        """uint8 [size], not to be written to; None: it is not there. Only once `done`."""
        ...

    @property
    def tier(self) -> Tier:
        """Where it came from. Only once `done`."""
        ...

    def release(self) -> None:
        """It is no longer needed. May come at any time, and twice."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """A chunk that was on the shelf when it was opened."""

    key: Key
    size: int
    head: int
    """Bytes of its head alone."""


class Shelf(Protocol):
    """Blobs by key and index. Any thread may call."""

    shared: bool
    """Whether others may put things here, so that only asking tells what there is."""

    def kept(self) -> Sequence[Kept]:
        """What was here when it was opened, the least recently used first."""
        ...

    def fetch(self, blob: Blob) -> Ticket:
        """Begin to fetch. Never blocks on I/O."""
        ...

    def tier(self, key: Key, index: int) -> Tier:
        """Where a blob would come from now, as far as that is known without asking anyone."""
        ...

    def put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
        """Keep copies of uint8 [bytes] each, all or none; False: there is no room now.

        Whatever is slower than memory is written behind the caller's back; see `writing`.
        """
        ...

    def drop(self, key: Key, blobs: int) -> None:
        """Forget that many blobs of a key, wherever they are."""
        ...

    def writing(self) -> int:
        """Bytes put and not yet written to where they are to stay."""
        ...

    def failed(self) -> dict[Key, int]:
        """Keys of which something could not be written since the last call, and how many bytes of each."""
        ...

    def check(self) -> list[str]:
        """What is wrong or still held though every ticket was released; empty is good."""
        ...

    def close(self) -> None:
        """Let go of everything. Tickets are not used afterwards."""
        ...


class MemoryShelf:
    """Blobs in a dictionary. Gone with the process."""

    shared = False

    def __init__(self) -> None:
        self._blobs: dict[tuple[Key, int], Tensor] = {}
        self._lock = threading.Lock()
        self._open = 0

    def kept(self) -> Sequence[Kept]:
        """See `Shelf`."""
        return ()

    def fetch(self, blob: Blob) -> Ticket:
        """See `Shelf`."""
        with self._lock:
            code = self._blobs.get((blob.key, blob.index))
            self._open += 1
        return _Here(self, code if code is not None and len(code) == blob.size else None)

    def tier(self, key: Key, index: int) -> Tier:
        """See `Shelf`."""
        return Tier.MEMORY

    def put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
        """See `Shelf`."""
        copies = {(key, index): blob.clone() for index, blob in enumerate(blobs)}
        with self._lock:
            self._blobs.update(copies)
        return True

    def drop(self, key: Key, blobs: int) -> None:
        """See `Shelf`."""
        with self._lock:
            for index in range(blobs):
                self._blobs.pop((key, index), None)

    def writing(self) -> int:
        """See `Shelf`."""
        return 0

    def failed(self) -> dict[Key, int]:
        """See `Shelf`."""
        return {}

    def check(self) -> list[str]:
        """See `Shelf`."""
        return [f"{self._open} tickets are out"] if self._open else []

    def close(self) -> None:
        """See `Shelf`."""
        self._blobs.clear()

    def released(self) -> None:
        """One of its tickets was."""
        with self._lock:
            self._open -= 1


class _Here:
    """A ticket for what is in memory: it holds the tensor, so dropping the blob does not take it away."""

    tier = Tier.MEMORY

    def __init__(self, shelf: MemoryShelf, code: Tensor | None) -> None:
        self._shelf: MemoryShelf | None = shelf
        self._code = code

    def done(self, timeout: float = 0.0) -> bool:
        return True

    def code(self) -> Tensor | None:
        return self._code

    def release(self) -> None:
        if self._shelf is not None:
            self._shelf.released()
            self._shelf = self._code = None
