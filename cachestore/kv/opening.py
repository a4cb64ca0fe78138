"""Opens the store on the tiers that were asked for, or on those that can be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cachestore.kv.format import Geometry
from cachestore.kv.shelf import MemoryShelf, Shelf, Tiers
from cachestore.kv.store import Happening, KvStore, Options


@dataclass(frozen=True, slots=True)
class Opened:
    """A store, and what whoever runs it should be told."""

    store: KvStore
    note: str | None
    """One sentence for the log: a tier that was asked for and is not there; None: all are."""


def open_store(
    geometry: Geometry, tiers: Tiers, options: Options, *, observe: Callable[[Happening], None] | None = None
) -> Opened:
    """Open it. Without LMCache there is only memory, and the note says so.

    `options.capacity` bounds the disk where there is one, else memory. Raises StoreError where the directory cannot be
    used, StoreLocked where another process uses it.
    """
    shelf: Shelf
    note = None
    if tiers.directory is None and tiers.redis is None:
        shelf = MemoryShelf()
    else:
        try:
            # Only here, since it takes seconds and a gigabyte of packages that not everyone has.
            from cachestore.kv.lmcache_shelf import LmcacheShelf
        except ImportError as error:
            shelf = MemoryShelf()
            note = f"no disk or Redis tier for stored keys and values: {error}; install hitpath[tiers] to have them"
        else:
            shelf = LmcacheShelf(geometry.identity, tiers)
    if isinstance(shelf, MemoryShelf):
        options = replace(options, capacity=min(options.capacity, tiers.memory))
    return Opened(KvStore(geometry, shelf, options, observe=observe), note)
