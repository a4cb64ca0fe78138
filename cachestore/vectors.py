"""The index: vectors by scope, in memory only.

A scope of one entry is a row in a shared slab. A scope of several is one contiguous area, searched flat. A scope that
outgrows a few thousand keeps new vectors in that area and pours them, in the background, into graphs; a graph with many
deleted elements is poured back the same way. So loading, growing and repairing are one thing, and each vector exists
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachestore.entry import Vector
from cachestore.flat import FlatArea, Found, Slabs
from cachestore.graph import Graph

_FLAT_MAX = 4096
"""Vectors that a scope holds before the first graph."""
_TAIL_MAX = 1024
"""Vectors that a scope with graphs keeps flat."""
_POUR = 128
_GRAPH_ROOM = 65_536
_NOWHERE = np.iinfo(np.int32).min
_MARGIN = 8
"""Elements asked of a graph beyond k: some may have been forgotten a moment ago."""


class Scope:
    """The vectors of a scope of several entries."""

    __slots__ = ("flat", "graphs")

    def __init__(self, dim: int) -> None:
        self.flat = FlatArea(dim)
        self.graphs: list[Graph] = []

    def __len__(self) -> int:
        return len(self.flat) + sum(graph.live for graph in self.graphs)

    @property
    def overflows(self) -> bool:
        """Whether flat vectors should be poured into a graph."""
        return len(self.flat) > (_TAIL_MAX if self.graphs else _FLAT_MAX)


@dataclass(frozen=True, slots=True)
class Pour:
    """Vectors on their way from a scope's flat area into a graph; they are searched in the area until `finish`."""

    scope: bytes
    graph: Graph
    slots: list[int]
    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def run(self) -> None:
        """The long part, for another thread."""
        self.graph.add(self.ids, self.vectors)


class VectorIndex:
    """All scopes. Belongs to the event loop's thread, but for `Pour.run`."""

    def __init__(self, id_of: Callable[[int], int], slot_of: Callable[[int], int | None]) -> None:
        self._id_of = id_of
        self._slot_of = slot_of
        self._scopes: dict[bytes, Scope | int] = {}
        """A scope of one entry is that entry's slot."""
        self._large: dict[bytes, Scope] = {}
        """Scopes that have graphs, or should."""
        self._slabs: Slabs | None = None
        self._row = np.zeros(0, np.int32)
        """By slot: the row in the slabs or in the scope's flat area, or minus the serial of its graph."""
        self._serial = 0

    def __len__(self) -> int:
        return len(self._scopes)

    def has(self, scope: bytes) -> bool:
        """Whether the scope holds anything."""
        return scope in self._scopes

    def fits(self, scope: bytes, vector: Vector) -> bool:
        """Whether a vector can be compared with those of the scope."""
        match self._scopes.get(scope):
            case None:
                return True
            case Scope() as several:
                return several.flat.dim == len(vector)
            case _:
                return self._slabs is not None and self._slabs.dim == len(vector)

    def add(self, scope: bytes, slot: int, vector: Vector) -> None:
        """Put a vector that `fits` under a slot that is not in the index."""
        if slot >= len(self._row):
            self._row.resize(max(256, slot + 1, len(self._row) * 9 // 8), refcheck=False)
        if self._slabs is None:
            self._slabs = Slabs(len(vector))
        area = self._scopes.get(scope)
        if area is None and self._slabs.dim == len(vector):
            self._scopes[scope] = slot
            self._row[slot] = self._slabs.add(vector)
            return
        if not isinstance(area, Scope):
            area = self._widen(scope, area, len(vector))
        self._row[slot] = area.flat.add(slot, vector)
        if area.overflows:
            self._large[scope] = area

    def _widen(self, scope: bytes, single: int | None, dim: int) -> Scope:
        """Give a scope an area of its own; the single entry it had moves there."""
        area = self._scopes[scope] = Scope(dim)
        if single is not None and self._slabs is not None:
            row = int(self._row[single])
            self._row[single] = area.flat.add(single, self._slabs.row(row))
            self._slabs.remove(row)
        return area

    def remove(self, scope: bytes, slot: int) -> None:
        """Take a slot's vector out."""
        area, row = self._scopes[scope], int(self._row[slot])
        self._row[slot] = _NOWHERE
        if not isinstance(area, Scope):
            assert self._slabs is not None
            self._slabs.remove(row)
            del self._scopes[scope]
            return
        if row >= 0:
            self._leave_flat(area, row)
        else:
            graph = next(graph for graph in area.graphs if graph.serial == -row)
            graph.remove(self._id_of(slot))
            graph.live -= 1
        if not len(area):
            del self._scopes[scope]
            self._large.pop(scope, None)

    def _leave_flat(self, area: Scope, row: int) -> None:
        moved = area.flat.remove(row)
        if moved is not None:
            self._row[moved] = row

    def search(self, scope: bytes, vector: Vector, k: int, floor: float) -> Found:
        """The k most similar slots of a scope at or above the floor, most similar first."""
        area = self._scopes.get(scope)
        if area is None or not self.fits(scope, vector):
            return []
        if not isinstance(area, Scope):
            assert self._slabs is not None
            similarity = float(self._slabs.row(int(self._row[area])) @ vector)
            return [(area, similarity)] if similarity >= floor else []
        found = area.flat.search(vector, k, floor)
        for graph in area.graphs:
            found += self._search_graph(graph, vector, k, floor)
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]

    def _search_graph(self, graph: Graph, vector: Vector, k: int, floor: float) -> Found:
        """Elements that live in this graph; those still being poured are found in the flat area."""
        found = []
        for id_, similarity in graph.search(vector, k + _MARGIN):
            slot = self._slot_of(id_)
            if slot is not None and similarity >= floor and self._row[slot] == -graph.serial:
                found.append((slot, similarity))
        return found

    @property
    def unsettled(self) -> bool:
        """Whether there is anything to pour or to retire."""
        return any(
            area.overflows or any(graph.sparse or graph.leaving is not None for graph in area.graphs)
            for area in self._large.values()
        )

    # Pouring, in short steps that the store's background task drives: one at a time

    def retire_some(self) -> bool:
        """Move some elements of sparse graphs back to their flat areas; says whether there was anything to do."""
        return sum(self._retire_some(area) for area in self._large.values()) > 0

    def _retire_some(self, area: Scope) -> bool:
        for graph in area.graphs:
            if graph.leaving is None and graph.sparse:
                graph.retire()
            if graph.leaving is not None and len(area.flat) <= 2 * _TAIL_MAX:
                self._leave_graph(area, graph, graph.leaving)
                return True
        return False

    def _leave_graph(self, area: Scope, graph: Graph, leaving: list[int]) -> None:
        batch, graph.leaving = leaving[:_POUR], leaving[_POUR:]
        slots = [self._slot_of(id_) for id_ in batch]
        moving = [
            (id_, slot)
            for id_, slot in zip(batch, slots, strict=True)
            if slot is not None and self._row[slot] == -graph.serial
        ]
        vectors = graph.vectors([id_ for id_, _ in moving])
        for (id_, slot), vector in zip(moving, vectors, strict=True):
            graph.remove(id_)
            self._row[slot] = area.flat.add(slot, vector)
        graph.live -= len(moving)
        if not graph.leaving:
            area.graphs.remove(graph)

    def next_pour(self) -> Pour | None:
        """Work for another thread, None when there is none. Call `finish` with it when it has run."""
        for scope, area in self._large.items():
            if area.overflows:
                slots, vectors = area.flat.last(_POUR)
                ids = np.array([self._id_of(slot) for slot in slots], np.int64)
                return Pour(scope, self._target(area), slots, ids, vectors)
        return None

    def _target(self, area: Scope) -> Graph:
        """The graph that takes what is poured: one of several bounded ones, so that one can be built anew."""
        for graph in area.graphs:
            if graph.room >= _POUR and graph.leaving is None:
                return graph
        self._serial += 1
        graph = Graph(area.flat.dim, max(_GRAPH_ROOM, len(area) // 4), self._serial)
        area.graphs.append(graph)
        return graph

    def finish(self, pour: Pour) -> None:
        """The graph has them now: let the flat area go of those that are still there."""
        area = self._scopes.get(pour.scope)
        for slot, id_ in zip(pour.slots, pour.ids.tolist(), strict=True):
            row = int(self._row[slot])
            if not isinstance(area, Scope) or self._slot_of(id_) != slot or row < 0:
                # Forgotten while it was poured.
                pour.graph.remove(id_)
                continue
            self._leave_flat(area, row)
            self._row[slot] = -pour.graph.serial
            pour.graph.live += 1

    def check(self) -> list[tuple[bytes, int]]:
        """Every scope with each of its slots, found by walking the areas."""
        found = [(scope, area) for scope, area in self._scopes.items() if isinstance(area, int)]
        for scope, area in self._scopes.items():
            if isinstance(area, Scope):
                found += [(scope, slot) for slot in area.flat.slots()]
                for graph in area.graphs:
                    found += [(scope, slot) for slot in self._slots_in(graph)]
        return found

    def _slots_in(self, graph: Graph) -> list[int]:
        slots = [self._slot_of(id_) for id_ in graph.ids()]
        return [slot for slot in slots if slot is not None and self._row[slot] == -graph.serial]
