"""Keys and values of text chunks, kept in tiers below the engine's pool. Needs torch; the gateway never imports it."""

from cachestore.errors import StoreError
from cachestore.kv.format import Chunk, Geometry, note_size, salt
from cachestore.kv.ledger import Key
from cachestore.kv.opening import Opened, open_store
from cachestore.kv.shelf import Tier, Tiers
from cachestore.kv.store import (
    Found,
    Gone,
    Happening,
    Kept,
    KvStore,
    Load,
    Lookup,
    Lost,
    Options,
    Refusal,
    Slot,
    Stats,
    Transfer,
)

__all__ = [
    "Chunk",
    "Found",
    "Geometry",
    "Gone",
    "Happening",
    "Kept",
    "Key",
    "KvStore",
    "Load",
    "Lookup",
    "Lost",
    "Opened",
    "Options",
    "Refusal",
    "Slot",
    "Stats",
    "StoreError",
    "Tier",
    "Tiers",
    "Transfer",
    "note_size",
    "open_store",
    "salt",
]
