"""Chunks of one request on their way from the store: first what there is, then a plan, then layer after layer.

All waiting is done on a thread of the fetch's own. The thread that computes may meet the layers while they come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cachestore.kv import Chunk, Found, KvStore, Lookup, Tier
from cachestore.kv.controller import Plan, Source, Wanted
from engine.reuse.cachecraft import unfit
from engine.reuse.chunks import ChunkKv
from engine.reuse.known import Text
from engine.reuse.writing import Noted, read_note

_log = logging.getLogger("hitpath.kv")


@dataclass(frozen=True, slots=True)
class Order:
    """A text that is wanted."""

    text: Text
    versions: tuple[Chunk, ...]
    """As the store knows it, the best first where their context indices do not say which is."""
    count: int
    """Tokens of it that the prompt has."""
    prefix: tuple[bytes, ...] = ()
    """Names of the texts that stand before it there."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens of the text."""
        return self.versions[0].tokens


_GRACE = 0.02
"""Seconds of loading that are not computed beside on a CPU: both want the same cores, and nothing would be hidden."""

Planner = Callable[[Sequence[Wanted]], Plan]


class Fetch:
    """What one request loads. `changed` is called on the fetch's thread when it is `over`, or computing may begin."""

    def __init__(
        self,
        store: KvStore,
        orders: Sequence[Order],
        plan: Planner,
        *,
        executor: ThreadPoolExecutor,
        changed: Callable[[], None],
        device: torch.device,
        patience: float,
    ) -> None:
        """Begins; does not wait. `patience`: seconds, of which heads get a fifth; for the rest the store has its."""
        self.orders = tuple(orders)
        self._store, self._plan, self._changed, self._device, self._patience = store, plan, changed, device, patience
        self._arrived = threading.Condition()
        self._columns: dict[int, int] = {}
        """By order: which of the loaded ones it is."""
        self._notes: dict[int, Noted] = {}
        self.tiers: dict[int, Tier] = {}
        """By order: where it was found."""
        self._rows: list[list[Tensor | None]] = []
        self.ratio = 0.0
        """Share of the loaded tokens that can be computed again while they are loaded."""
        self.over = self._closed = False
        self._begin: float | None = None
        """When computing may begin though not all is there."""
        lookup = store.lookup([version for order in orders for version in order.versions])
        executor.submit(self._run, lookup)

    @property
    def planned(self) -> bool:
        """Whether computing may begin."""
        return self.over or (self._begin is not None and time.monotonic() >= self._begin)

    def note(self, index: int) -> Noted | None:
        """What was written down with an order's chunk; None: it is not loaded, or lost already. Once `planned`."""
        column = self._columns.get(index)
        if column is None or any(row[column] is None for row in self._rows[-1:]):
            return None
        return None if self.over and len(self._rows) < self._store.geometry.layers else self._notes[index]

    def layer(self, index: int, layer: int) -> Tensor | None:
        """[2, T, K, D] of an order's chunk, waiting for it; None: it is lost."""
        with self._arrived:
            while len(self._rows) <= layer and not self.over and not self._closed:
                self._arrived.wait()
            return self._rows[layer][self._columns[index]] if len(self._rows) > layer else None

    def chunk(self, index: int) -> ChunkKv | None:
        """An order's chunk, when all is `over` and it was not lost."""
        noted = self.note(index)
        if not self.over or noted is None:
            return None
        column = self._columns[index]
        layers = tuple(piece for row in self._rows if (piece := row[column]) is not None)
        return noted.chunk(self.orders[index].tokens, layers)

    def close(self) -> None:
        """Nobody wants it any more; what still waits for a layer is told that it is lost."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def _run(self, lookup: Lookup) -> None:
        try:
            if not self._closed:
                lookup.wait(self._patience)
            if self._closed:
                lookup.close()
            else:
                self._read(lookup, self._choose(lookup))
        except Exception:  # whatever it is, the prompt can be computed without
            _log.exception("stored chunks could not be fetched")
        finally:
            with self._arrived:
                self.over = True
                self._arrived.notify_all()
            self._changed()

    def _choose(self, lookup: Lookup) -> dict[int, int]:
        """Which version of which order is loaded: by its place in the lookup, the order."""
        best, first = {}, 0
        for index, order in enumerate(self.orders):
            places = range(first, first + len(order.versions))
            first = places.stop
            if (place := _best(lookup, order, places)) is not None:
                best[index] = place
        wanted = []
        for index, order in enumerate(self.orders):
            found = lookup.found[best[index]] if index in best else None
            wanted.append(Wanted(order.count, () if found is None else (self._source(order, found),)))
            if found is not None:
                self.tiers[index] = found.tier
        plan = self._plan(wanted)
        self.ratio = plan.ratio
        return {best[index]: index for index in best if index in plan.loaded}

    def _source(self, order: Order, found: Found) -> Source:
        plain = len(order.tokens) * self._store.geometry.token_bytes
        return Source(found.tier, found.codec, found.size, plain)

    def _read(self, lookup: Lookup, chosen: dict[int, int]) -> None:
        """Layer after layer of what is chosen."""
        load = self._store.prepare_load(lookup, chosen)
        try:
            for column, place in enumerate(sorted(chosen)):
                self._columns[chosen[place]] = column
                self._notes[chosen[place]] = read_note(load.note(column), len(lookup.chunks[place].tokens))
            for row in load.layers():
                with self._arrived:
                    if self._closed:
                        return
                    self._rows.append([None if piece is None else piece.to(self._device) for piece in row])
                    self._arrived.notify_all()
                if self._begin is None:  # without the first layer nothing could be computed
                    self._now_planned()
        finally:
            self.tiers |= {chosen[place]: load.tier(column) for column, place in enumerate(sorted(chosen))}
            self._store.complete_load(load)

    def _now_planned(self) -> None:
        if self._device.type == "cpu":
            self._begin = time.monotonic() + _GRACE  # who waits looks again by then
        else:
            self._begin = 0.0
            self._changed()


def _best(lookup: Lookup, order: Order, places: range) -> int | None:
    """Of an order's versions at these places of the lookup the one that was found and needs least repair."""
    heads = [(place, head) for place in places if (head := lookup.head(place)) is not None]
    if len(heads) < 2:
        return heads[0][0] if heads else None
    return min(heads, key=lambda pair: unfit(read_note(pair[1].note, len(order.tokens)).context, order.prefix))[0]
