"""What is remembered: the entry log, the index, the bodies."""

from cachestore.entry import Document, Filter, Hit, Neighbour, Vector
from cachestore.errors import StoreError, StoreLocked
from cachestore.log import EntryRow
from cachestore.options import StoreOptions, StoreStats
from cachestore.store import Store

__all__ = [
    "Document",
    "EntryRow",
    "Filter",
    "Hit",
    "Neighbour",
    "Store",
    "StoreError",
    "StoreLocked",
    "StoreOptions",
    "StoreStats",
    "Vector",
]
