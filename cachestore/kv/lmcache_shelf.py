"""Memory, disk and Redis behind one `Shelf`, through LMCache's storage manager. The only file that knows LMCache.

It is LMCache's internal interface (0.5.6, pinned), so everything that is relied on is written down here:

- `reserve_write` hands out buffers in its memory, `finish_write` makes them visible and copies them to the slower tiers
  in a thread of its own; `reserve_read` locks what is in memory until `finish_read_prefetched`. What it evicts stays in
  the slower tiers.
- What is not in memory is brought by threads of ours, into a buffer staged under a tag of ours, which
  `finish_write_and_reserve_read` makes visible without copying it back. LMCache's own prefetching takes a quarter of a
  millisecond of its thread for each object, hands a result out once, and keeps locks of results that nobody fetched.
- A copy in memory wins over a newer one of the same name; so what is dropped is waited for.
- Its adapter for files says nothing of a write that failed, that for Redis never answers again once Redis was away:
  `_Slower` stands in for both. Bounds are kept by the store's ledger.
- It reports usage to its makers unless told not to before it is imported.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cachestore.kv.crew import Crew
from cachestore.kv.file_blobs import UNFINISHED, FileBlobs
from cachestore.kv.ledger import Key
from cachestore.kv.redis_blobs import RedisBlobs
from cachestore.kv.shelf import Blob, Kept, Ticket, Tier, Tiers
from cachestore.lock import DirectoryLock

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.config import (
        EvictionConfig,
        L1ManagerConfig,
        L1MemoryManagerConfig,
        StorageManagerConfig,
    )
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
    from lmcache.v1.distributed.l2_adapters.config import (
        L2AdapterConfigBase,
        L2AdaptersConfig,
        register_l2_adapter_type,
    )
    from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
    from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import _filename_to_object_key, _object_key_to_filename
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.platform import create_event_notifier

_log = logging.getLogger("hitpath.kv")
_LOCKED = 3600
"""Seconds after which LMCache takes a read lock back; no load lasts so long."""
_TRIES, _PAUSE = 20, 0.05
"""How often, and with how many seconds between, room in memory is asked for while LMCache evicts."""
_LULL = 2.0
"""Seconds without any write under way after which what was never reported counts as failed."""
_READERS, _MOST_READERS = 4, 16
"""Threads that bring what is not in memory, and those of them that may hang for ever."""
_STALLED = 1.0
"""Seconds after which a read may never end: nobody else waits for it, and another thread takes its reader's place."""
_BROUGHT = "brought"
"""Tag of what they stage."""

Outcome = Callable[[Any, int], None]
"""Hears of each object how many of its bytes were not written."""


class LmcacheShelf:
    """See `cachestore.kv.shelf.Shelf`."""

    def __init__(self, identity: bytes, tiers: Tiers) -> None:
        """`identity` of the model's keys and values. Raises StoreError where the directory cannot be used."""
        self._model = identity.hex()
        self.shared = tiers.redis is not None
        self._lock = threading.Lock()
        self._writing: dict[Any, tuple[int, int]] = {}
        """By object: its bytes, and how many tiers have not said how it went."""
        self._putting = 0
        """Chunks that have some of their buffers, or all, and are not visible yet."""
        self._failed: Counter[Key] = Counter()
        """Bytes that were not written."""
        self._lull: float | None = None
        self._flights: dict[Any, _Flight] = {}
        """By object: what is bringing it."""
        self._readers = Crew(_READERS, "kv-read", slow=_STALLED, most=_MOST_READERS)
        self._directory: Path | None = None
        self._held: DirectoryLock | None = None
        self._slower: dict[Tier, _Config] = {}
        """The fastest first."""
        if tiers.directory is not None:
            self._directory = tiers.directory / self._model
            self._held = DirectoryLock(self._directory)
            self._slower[Tier.DISK] = _Config(FileBlobs(self._directory), _object_key_to_filename, self._ended)
        if tiers.redis is not None:
            # Where there is a disk, only the disk's failures matter: nothing is lost while one tier has it.
            report = self._ended if tiers.directory is None else self._tolerated
            self._slower[Tier.REMOTE] = _Config(RedisBlobs(tiers.redis), _name, report)
        self._kept = [] if self._directory is None else _inventory(self._directory)
        self._on_disk = {kept.key for kept in self._kept}
        memory = L1MemoryManagerConfig(max(tiers.memory, 1 << 20), False, shm_name="")
        self.manager = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(memory, read_ttl_seconds=_LOCKED),
                eviction_config=EvictionConfig("LRU"),
                l2_adapter_config=L2AdaptersConfig(list(self._slower.values())),
            )
        )

    def kept(self) -> Sequence[Kept]:
        """See `Shelf`."""
        return self._kept

    def fetch(self, blob: Blob) -> Ticket:
        """See `Shelf`."""
        name = self._object(blob.key, blob.index)
        ticket = _Fetch(self, name, blob.size)
        if not ticket.take(Tier.MEMORY) and self._slower:
            self._fly(name, blob, ticket)
        return ticket

    def _fly(self, name: Any, blob: Blob, ticket: _Fetch) -> None:
        """Have an object brought, unless it is under way, or nothing could be expected of that."""
        with self._lock:
            flight = self._flights.get(name)
            if self._readers.stuck() if flight is None else flight.stalled():
                ticket.flight = _Flight(grounded=True)
                return
            if begun := flight is None:
                flight = self._flights[name] = _Flight()
            flight.tickets.append(ticket)
            ticket.flight = flight
        if begun:
            self._readers.submit(partial(self._bring, name, blob, flight))

    def wait(self, flight: _Flight, timeout: float) -> bool:
        """Whether it is over within so many seconds."""
        if flight.over.wait(min(timeout, _STALLED)):
            return True
        if timeout <= _STALLED:
            return False
        self._readers.relieve()  # or what waits behind hanging ones would wait until somebody wants something else
        return flight.over.wait(timeout - _STALLED)

    def _bring(self, name: Any, blob: Blob, flight: _Flight) -> None:
        """On a thread of its own: an object into memory, and to all who wait for it."""
        flight.began = time.monotonic()
        tier = None
        try:
            tier = self._read(name, blob)
        except Exception:
            _log.exception("a stored chunk could not be read")
        with self._lock:
            del self._flights[name]  # who asks from now on looks into memory first
        if tier is not None:
            for ticket in flight.tickets:
                ticket.take(tier)
            self.manager.finish_read_prefetched([name])
        flight.over.set()

    def _read(self, name: Any, blob: Blob) -> Tier | None:
        """Which tier had it; it is in memory then, and locked once."""
        memory = self.manager._l1_manager
        layout = MemoryLayoutDesc([torch.Size([blob.size])], [torch.uint8])
        staged = memory.reserve_write([name], [False], layout, tag=_BROUGHT)[name][1]
        if staged is None:
            # No room, or somebody stored it in this moment.
            return Tier.MEMORY if memory.reserve_read([name])[name][1] is not None else None
        came = None
        try:
            came = next((t for t, c in self._slower.items() if c.blobs.get(c.name(name), staged.byte_array)), None)
        finally:
            if came is None:
                memory.finish_write_and_delete([name], tag=_BROUGHT)
        if came is not None:
            memory.finish_write_and_reserve_read([name], tag=_BROUGHT)
        return came

    def tier(self, key: Key, index: int) -> Tier:
        """See `Shelf`."""
        if not self._slower or self.manager._l1_manager.get_object_state(self._object(key, index)) is not None:
            return Tier.MEMORY
        with self._lock:
            on_disk = Tier.DISK in self._slower and key in self._on_disk
        return Tier.DISK if on_disk else list(self._slower)[-1]

    def put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
        """See `Shelf`."""
        with self._lock:
            self._putting += 1
        try:
            return self._put(key, blobs)
        finally:
            with self._lock:
                self._putting -= 1

    def _put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
        names = [self._object(key, index) for index in range(len(blobs))]
        buffers = self._reserve(names, blobs)
        if buffers is None:
            return False
        for name, blob in zip(names, blobs, strict=True):
            buffers[name].tensor.copy_(blob)
        if self._slower:
            with self._lock:
                self._lull = None
                for name, blob in zip(names, blobs, strict=True):
                    self._writing[name] = (len(blob), len(self._slower))
        # The head last: what has one is whole.
        self.manager.finish_write([*names[1:], names[0]])
        with self._lock:
            self._on_disk.add(key)
        return True

    def drop(self, key: Key, blobs: int) -> None:
        """See `Shelf`."""
        names = [self._object(key, index) for index in range(blobs)]
        for _ in range(_TRIES):
            # What is still locked cannot be replaced: its copy would win over a new one.
            if self.manager.delete_l1_keys(names)[1] == 0:
                break
            time.sleep(_PAUSE)
        for config in self._slower.values():
            config.blobs.delete([config.name(name) for name in names])
        with self._lock:
            self._on_disk.discard(key)
            for name in names:
                self._writing.pop(name, None)

    def writing(self) -> int:
        """See `Shelf`."""
        with self._lock:
            if self._writing and self._quiet():
                for name, (size, _) in self._writing.items():
                    self._failed[_key(name)] += size
                self._writing.clear()
            return sum(size for size, _ in self._writing.values())

    def failed(self) -> dict[Key, int]:
        """See `Shelf`."""
        self.writing()
        with self._lock:
            failed, self._failed = dict(self._failed), Counter()
        if failed and self._directory is not None:
            # Someone may have removed it; whatever else is wrong with it is not made worse.
            with suppress(OSError):
                self._directory.mkdir(parents=True, exist_ok=True)
        return failed

    def check(self) -> list[str]:
        """See `Shelf`."""
        for _ in range(_TRIES):
            # LMCache says that something is done a moment before it lets go of it: only what stays is wrong.
            if not (wrong := self._held_now()):
                break
            time.sleep(_PAUSE)
        return wrong

    def _held_now(self) -> list[str]:
        status = self.manager.report_status()
        memory, writer = status["l1_manager"], status["store_controller"]
        wrong = [] if status["is_healthy"] else ["a thread of the storage manager has ended"]
        busy = writer["pending_keys_count"] or writer["in_flight_task_count"]
        if busy or self._putting or self.writing() or self._flights:
            return wrong  # what is being written or still on its way is locked, and should be
        held = ("read_locked_count", "write_locked_count", "temporary_count")
        return wrong + [f"{what} is {memory[what]}" for what in held if memory[what]]

    def close(self) -> None:
        """See `Shelf`."""
        if self._readers.close():
            self.manager.close()
        else:  # its memory may still be read into
            _log.warning("reads of stored chunks hang; their memory is given back when the process ends")
        if self._held is not None:
            self._held.release()

    def _object(self, key: Key, index: int) -> Any:
        salt, name = key
        return ObjectKey(name, self._model, 0, index, salt)

    def _reserve(self, names: list[Any], blobs: Sequence[Tensor]) -> dict[Any, Any] | None:
        """Buffers for all, or none."""
        buffers: dict[Any, Any] = {}
        for name, blob in zip(names, blobs, strict=True):
            layout = MemoryLayoutDesc([torch.Size([len(blob)])], [torch.uint8])
            for attempt in range(_TRIES):
                if attempt:
                    time.sleep(_PAUSE)
                buffers |= self.manager.reserve_write([name], layout)
                if name in buffers:
                    break
            else:
                self._unreserve(list(buffers))
                return None
        return buffers

    def _unreserve(self, names: list[Any]) -> None:
        # `finish_write` alone would copy them to the slower tiers.
        self.manager._l1_manager.finish_write_and_delete(names, tag="storage_manager")

    def _ended(self, name: Any, lacking: int) -> None:
        """A tier says how many bytes of this it could not write."""
        with self._lock:
            if lacking:
                self._failed[_key(name)] += lacking
            if name in self._writing:
                size, tiers = self._writing[name]
                self._writing[name] = (size, tiers - 1)
                if tiers == 1:
                    del self._writing[name]

    def _tolerated(self, name: Any, lacking: int) -> None:
        self._ended(name, 0)

    def _quiet(self) -> bool:
        """Whether LMCache has had nothing to write for a while, so that what was not reported never will be."""
        store = self.manager.report_status()["store_controller"]
        if store["pending_keys_count"] or store["in_flight_task_count"]:
            self._lull = None
            return False
        now = time.monotonic()
        self._lull = now if self._lull is None else self._lull
        return now - self._lull >= _LULL


class _Flight:
    """An object on its way into memory, and all who wait for it."""

    def __init__(self, *, grounded: bool = False) -> None:
        self.grounded = grounded
        """It never begins: there is no use in waiting."""
        self.began: float | None = None
        self.tickets: list[_Fetch] = []
        self.over = threading.Event()

    def stalled(self) -> bool:
        """Whether it may never be over."""
        return self.began is not None and self.began < time.monotonic() - _STALLED


class _Fetch:
    """A ticket: one object, locked in memory from when it is there until it is released."""

    def __init__(self, shelf: LmcacheShelf, name: Any, size: int) -> None:
        self._shelf, self._name, self._size = shelf, name, size
        self._lock = threading.Lock()
        self._object: Any = None
        self._released = False
        self.tier = Tier.MEMORY
        self.flight: _Flight | None = None
        """None: it is known what came."""

    def take(self, tier: Tier) -> bool:
        """Lock it where it is in memory now, brought from this tier; whether it is."""
        with self._lock:
            if self._released:
                return False
            self._object = self._shelf.manager._l1_manager.reserve_read([self._name])[self._name][1]
            self.tier = tier
            return self._object is not None

    def done(self, timeout: float = 0.0) -> bool:
        if self.flight is not None and not self.flight.grounded and self._shelf.wait(self.flight, timeout):
            self.flight = None
        return self.flight is None

    def code(self) -> Tensor | None:
        if self._object is None or len(self._object.tensor) != self._size:
            return None
        code: Tensor = self._object.tensor
        return code

    def release(self) -> None:
        with self._lock:
            held, self._object, self._released = self._object, None, True
        if held is not None:
            self._shelf.manager.finish_read_prefetched([self._name])


def _key(name: Any) -> Key:
    return (name.cache_salt, name.chunk_hash)


def _inventory(directory: Path) -> list[Kept]:
    """What an earlier process left, oldest first; what it did not finish is removed."""
    sizes: dict[Key, int] = {}
    used: dict[Key, float] = {}
    heads: dict[Key, int] = {}
    paths: dict[Key, list[Path]] = {}
    for path in directory.iterdir():
        name = _filename_to_object_key(path.name)
        if name is None:
            if path.suffix == UNFINISHED:
                path.unlink(missing_ok=True)
            continue
        key, status = _key(name), path.stat()
        sizes[key] = sizes.get(key, 0) + status.st_size
        used[key] = max(used.get(key, 0.0), status.st_mtime)
        paths.setdefault(key, []).append(path)
        if name.object_group_id == 0:
            heads[key] = status.st_size
    for key in sizes.keys() - heads.keys():
        for path in paths[key]:
            path.unlink(missing_ok=True)
    return [Kept(key, sizes[key], heads[key]) for key in sorted(heads, key=used.__getitem__)]


class _Blobs(Protocol):
    """See `FileBlobs` and `RedisBlobs`, which call what they keep by names of their own."""

    def get(self, name: Any, target: memoryview) -> bool: ...

    def set(self, name: Any, data: memoryview) -> bool: ...

    def delete(self, names: Sequence[Any]) -> bool: ...

    def close(self) -> None: ...


class _Config(L2AdapterConfigBase):  # type: ignore[misc]
    """Where the bytes go, what an object is called there, and whom to tell."""

    def __init__(self, blobs: _Blobs, name: Callable[[Any], Any], outcome: Outcome) -> None:
        super().__init__()
        self.blobs, self.name, self.outcome = blobs, name, outcome

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> _Config:
        raise NotImplementedError("only made by this file")

    @classmethod
    def help(cls) -> str:
        return "only made by hitpath"


class _Slower(L2AdapterInterface):  # type: ignore[misc]
    """A tier for LMCache to write to, on a thread of its own. It is never asked to read."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self._blobs, self._name, self._outcome = config.blobs, config.name, config.outcome
        self._writer = ThreadPoolExecutor(1, "kv-put")
        self._guard = threading.Lock()
        self._tasks = 0
        self._stored: dict[int, list[tuple[Any, int]]] = {}
        """By task that has ended: how many bytes of each object were not written."""
        self._bells = {name: create_event_notifier() for name in ("store", "lookup", "load")}

    def get_store_event_fd(self) -> int:
        return int(self._bells["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._bells["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._bells["load"].fileno())

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        self._tasks += 1
        self._writer.submit(self._store, self._tasks, keys, objects)
        return self._tasks

    def _store(self, task: int, keys: list[Any], objects: list[Any]) -> None:
        ends = [(key, self._put(key, item)) for key, item in zip(keys, objects, strict=True)]
        with self._guard:
            self._stored[task] = ends
        self._bells["store"].notify()

    def _put(self, key: Any, item: Any) -> int:
        """Bytes that were not written."""
        try:
            return 0 if self._blobs.set(self._name(key), item.byte_array) else len(item.byte_array)
        except Exception:
            _log.exception("a stored chunk could not be written")
            return len(item.byte_array)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        with self._guard:
            completed, self._stored = self._stored, {}
        # Only here, since LMCache lets go of them next.
        for key, lacking in itertools.chain.from_iterable(completed.values()):
            self._outcome(key, lacking)
        return {task: L2StoreResult(not any(lacking for _, lacking in ends), 0) for task, ends in completed.items()}

    def _read(self, *asked: Any) -> Any:
        """What LMCache would call to read; nobody asks it to, since reading is ours."""
        raise NotImplementedError("this tier is only written to")

    submit_lookup_and_lock_task = query_lookup_and_lock_result = submit_unlock = _read
    submit_load_task = query_load_result = _read

    def delete(self, keys: list[Any]) -> None:
        self._blobs.delete([self._name(key) for key in keys])

    def close(self) -> None:
        self._writer.shutdown(cancel_futures=True)
        self._blobs.close()
        for bell in self._bells.values():
            bell.close()


def _name(key: Any) -> bytes:
    return f"{key.model_name}:{key.cache_salt}:{key.chunk_hash.hex()}:{key.object_group_id}".encode()


def _make(config: Any, memory: Any = None) -> Any:
    return _Slower(config)


register_l2_adapter_type("hitpath", _Config)
register_l2_adapter_factory("hitpath", _make)
