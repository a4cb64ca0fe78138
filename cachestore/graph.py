"""A part of a large scope as an HNSW graph (hnswlib).

Deleted elements stay in the graph as waypoints until it is retired. Reusing their places (`replace_deleted`) was
measured and rejected: after deleting and re-adding half of 50 000, recall@1 fell from .998 to .988 and an insertion
took four times as long (clustered vectors, 384 dimensions, ef 64).
"""

from __future__ import annotations

import threading
import time

import hnswlib
import numpy as np
from numpy.typing import NDArray

from cachestore.entry import Vector

_M = 16
_EF_CONSTRUCTION = 100
_EF = 80
_FIRST_CAPACITY = 8192
_YIELD = 0.0001


class Graph:
    """Elements are added by one other thread; everything else happens on the event loop.

    hnswlib forbids searching while adding, so a lock is held for one element at a time (about half a millisecond), and
    the adding thread steps back when a search wants the lock: Python's locks are not fair.
    """

    def __init__(self, dim: int, room: int, serial: int) -> None:
        """`room`: elements that it will take at most; `serial`: its name within the index, from 1."""
        self.serial = serial
        self.live = 0
        """Elements that are found here; the index counts them."""
        self.leaving: list[int] | None = None
        """When the graph is being retired: ids that may still have to leave it."""
        self._room = room
        self._wanted = False
        self._lock = threading.Lock()
        self._index = hnswlib.Index("ip", dim)
        self._index.init_index(min(_FIRST_CAPACITY, room), M=_M, ef_construction=_EF_CONSTRUCTION)
        self._index.set_num_threads(1)
        self._index.set_ef(_EF)

    def __len__(self) -> int:
        """Elements, the deleted ones included."""
        return int(self._index.element_count)

    @property
    def room(self) -> int:
        """Elements that still fit."""
        return self._room - len(self)

    def retire(self) -> None:
        """Take no more elements; those here are to leave."""
        self.leaving = self.ids()

    def ids(self) -> list[int]:
        """All elements, the deleted ones included."""
        with self._mine():
            return list(self._index.get_ids_list())

    @property
    def sparse(self) -> bool:
        """Whether so many are deleted that the graph is better built anew."""
        return len(self) - self.live > max(1024, len(self) // 4)

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Add elements, one at a time. In another thread than the event loop's; this may take long."""
        for row in range(len(ids)):
            while self._wanted:
                time.sleep(_YIELD)
            with self._lock:
                if len(self) == self._index.max_elements:
                    # Two or three milliseconds at 64 000: a search that meets it waits, once per doubling.
                    self._index.resize_index(min(self._room, 2 * len(self)))
                self._index.add_items(vectors[row : row + 1], ids[row : row + 1])

    def remove(self, id: int) -> None:
        """Never return this element again."""
        with self._mine():
            self._index.mark_deleted(id)

    def vectors(self, ids: list[int]) -> NDArray[np.float32]:
        """The vectors of elements: [n, dim]."""
        if not ids:
            return np.zeros((0, self._index.dim), np.float32)
        with self._mine():
            return np.asarray(self._index.get_items(ids, return_type="numpy"), np.float32)

    def search(self, vector: Vector, k: int) -> list[tuple[int, float]]:
        """Ids and cosines of about the k most similar elements."""
        with self._mine():
            k = min(k, self.live)
            self._index.set_ef(max(_EF, k))
            while k > 0:
                try:
                    ids, distances = self._index.knn_query(vector, k=k)
                except RuntimeError:
                    # It met fewer than k that are not deleted.
                    k //= 2
                    continue
                return list(zip(ids[0].tolist(), (1.0 - distances[0]).tolist(), strict=True))
        return []

    def _mine(self) -> _Turn:
        return _Turn(self)


class _Turn:
    """The lock, asked for with precedence over the adding thread."""

    __slots__ = ("_graph",)

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        self._graph._wanted = True
        self._graph._lock.acquire()
        self._graph._wanted = False

    def __exit__(self, *_: object) -> None:
        self._graph._lock.release()
