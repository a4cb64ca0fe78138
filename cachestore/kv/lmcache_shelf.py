"""Memory, disk and Redis behind one `Shelf`, through LMCache's storage manager. The only file that knows LMCache.

It is LMCache's internal interface (0.5.6, pinned), so everything that is relied on is written down here:

- `reserve_write` hands out buffers in its memory, `finish_write` makes them visible and copies them to the slower tiers
  in a thread of its own; `reserve_read` locks what is in memory and `submit_prefetch_task` brings what is not, until
  `finish_read_prefetched`; a task's result is handed out once, and a lock whose result nobody fetched stays for an
  hour. So nothing is abandoned: what is released before it came is fetched later (`_reap`).
- A copy in memory wins over a newer one of the same name; so what is dropped is waited for.
- Its adapter for files never overwrites one, never cleans up what a killed process left, has no bound, and says nothing
  of a write that failed; `_Disk` adds what is missing. Bounds are kept by the store's ledger.
- Its adapter for Redis never answers again once Redis was away (0.5.6), so `_Remote` stands in for it.
- It reports usage to its makers unless told not to before it is imported.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachestore.kv.ledger import Key
from cachestore.kv.redis_blobs import RedisBlobs
from cachestore.kv.shelf import Blob, Kept, Ticket, Tier, Tiers
from cachestore.lock import DirectoryLock

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
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
    from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import (
        FSL2Adapter,
        FSL2AdapterConfig,
        _filename_to_object_key,
    )
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.platform import create_event_notifier

_log = logging.getLogger("hitpath.kv")
_LOCKED = 3600
"""Seconds after which LMCache takes a read lock back; no load lasts so long."""
_TRIES, _PAUSE = 20, 0.05
"""How often, and with how many seconds between, room in memory is asked for while LMCache evicts."""
_LULL = 2.0
"""Seconds without any write under way after which what was never reported counts as failed."""
_REMOTE_WORKERS = 4

Outcome = Callable[[Sequence[Any], bool], None]


class LmcacheShelf:
    """See `cachestore.kv.shelf.Shelf`."""

    def __init__(self, identity: bytes, tiers: Tiers) -> None:
        """`identity` of the model's keys and values. Raises StoreError where the directory cannot be used."""
        self._model = identity.hex()
        self.shared = tiers.redis is not None
        self._lock = threading.Lock()
        self._writing: dict[Any, tuple[int, int]] = {}
        """By object: its bytes, and how many tiers have not said how it went."""
        self._failed: dict[Key, None] = {}
        self._lull: float | None = None
        self._abandoned: list[_Fetch] = []
        self._flights: dict[Any, _Flight] = {}
        """By object: what is bringing it."""
        self._directory: Path | None = None
        self._held: DirectoryLock | None = None
        self._slower: list[Tier] = []
        configs: list[Any] = []
        if tiers.directory is not None:
            self._directory = tiers.directory / self._model
            self._held = DirectoryLock(self._directory)
            configs.append(_DiskConfig(self._directory, self._ended))
            self._slower.append(Tier.DISK)
        if tiers.redis is not None:
            # Where there is a disk, only the disk's failures matter: nothing is lost while one tier has it.
            report = self._ended if tiers.directory is None else self._tolerated
            configs.append(_RemoteConfig(tiers.redis, report))
            self._slower.append(Tier.REMOTE)
        self._kept = [] if self._directory is None else _inventory(self._directory)
        self._on_disk = {kept.key for kept in self._kept}
        memory = L1MemoryManagerConfig(max(tiers.memory, 1 << 20), False, shm_name="")
        self.manager = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(memory, read_ttl_seconds=_LOCKED),
                eviction_config=EvictionConfig("LRU"),
                l2_adapter_config=L2AdaptersConfig(configs),
                prefetch_policy="retain",
            )
        )

    def kept(self) -> Sequence[Kept]:
        """See `Shelf`."""
        return self._kept

    def fetch(self, blob: Blob) -> Ticket:
        """See `Shelf`."""
        self._reap()
        return _Fetch(self, self._object(blob.key, blob.index), blob)

    def tier(self, key: Key, index: int) -> Tier:
        """See `Shelf`."""
        if not self._slower or self.manager._l1_manager.get_object_state(self._object(key, index)) is not None:
            return Tier.MEMORY
        return self.slower(key)

    def put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
        """See `Shelf`."""
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
            # What a load that was given up still locks cannot be replaced: its copy would win over a new one.
            if self.manager.delete_l1_keys(names)[1] == 0:
                break
            time.sleep(_PAUSE)
            self._reap()
        for _, adapter in self.manager.l2_adapters():
            adapter.delete(names)
        with self._lock:
            self._on_disk.discard(key)
            for name in names:
                self._writing.pop(name, None)

    def writing(self) -> int:
        """See `Shelf`."""
        self._reap()
        with self._lock:
            if self._writing and self._quiet():
                for name in self._writing:
                    self._failed[_key(name)] = None
                self._writing.clear()
            return sum(size for size, _ in self._writing.values())

    def failed(self) -> list[Key]:
        """See `Shelf`."""
        self.writing()
        with self._lock:
            failed, self._failed = list(self._failed), {}
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
        self._reap()
        status = self.manager.report_status()
        memory, writer = status["l1_manager"], status["store_controller"]
        wrong = [] if status["is_healthy"] else ["a thread of the storage manager has ended"]
        busy = writer["pending_keys_count"] or writer["in_flight_task_count"]
        if busy or self.writing() or self._abandoned:
            return wrong  # what is being written or still on its way is locked, and should be
        held = ("read_locked_count", "write_locked_count", "temporary_count")
        return wrong + [f"{what} is {memory[what]}" for what in held if memory[what]]

    def close(self) -> None:
        """See `Shelf`."""
        self._reap()
        self.manager.close()
        if self._held is not None:
            self._held.release()

    def slower(self, key: Key) -> Tier:
        """Where something that was not in memory came from."""
        with self._lock:
            return Tier.DISK if Tier.DISK in self._slower and key in self._on_disk else self._slower[-1]

    def has_slower(self) -> bool:
        """Whether there is anything but memory."""
        return bool(self._slower)

    def flight(self, name: Any, blob: Blob) -> tuple[_Flight, bool]:
        """What brings an object, and whether it was begun just now."""
        with self._lock:
            if (known := self._flights.get(name)) is not None:
                return known, False
            begun = self._flights[name] = _Flight(self, name, blob)
            return begun, True

    def landed(self, name: Any, flight: _Flight) -> None:
        """It came, or did not; who asks from now on asks anew."""
        with self._lock:
            if self._flights.get(name) is flight:
                del self._flights[name]

    def abandon(self, fetch: _Fetch) -> None:
        """Nobody waits for it any more; its lock is given back when it has come."""
        with self._lock:
            self._abandoned.append(fetch)

    def _reap(self) -> None:
        if not self._abandoned:
            return
        with self._lock:
            waiting, self._abandoned = self._abandoned, []
        late = [fetch for fetch in waiting if not fetch.done()]
        for fetch in waiting:
            if fetch not in late:
                fetch.release()
        with self._lock:
            self._abandoned += late

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

    def _ended(self, names: Sequence[Any], well: bool) -> None:
        """A tier says how writing these went."""
        with self._lock:
            for name in names:
                if not well:
                    self._failed[_key(name)] = None
                if name in self._writing:
                    size, tiers = self._writing[name]
                    self._writing[name] = (size, tiers - 1)
                    if tiers == 1:
                        del self._writing[name]

    def _tolerated(self, names: Sequence[Any], well: bool) -> None:
        self._ended(names, True)

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
    """An object on its way into memory, and all who wait for it: LMCache tells only one of those who ask at once."""

    def __init__(self, shelf: LmcacheShelf, name: Any, blob: Blob) -> None:
        self._manager, self._lock = shelf.manager, threading.Lock()
        layout = MemoryLayoutDesc([torch.Size([blob.size])], [torch.uint8])
        row = GroupedObjectKeys([name], blob.index, layout)
        self._handle: Any = self._manager.submit_prefetch_task(PrefetchTaskSpec([row], fetching_policy="full"))
        """None once its result was fetched."""
        self.in_memory = self.came = False
        """It had come before, somebody else's doing; it came at all."""

    def done(self, timeout: float) -> bool:
        """Whether it is known what came; waits so many seconds for that."""
        if not self._lock.acquire(timeout=timeout) if timeout > 0 else not self._lock.acquire(blocking=False):
            return False
        try:
            if self._handle is not None and self._manager.wait_prefetch_status(self._handle, timeout):
                result, self._handle = self._manager.query_prefetch_status(self._handle), None
                self.in_memory = bool(result.l1_hit_count)
                self.came = bool(result.l1_hit_count + result.l2_hit_count)
            return self._handle is None
        finally:
            self._lock.release()


class _Fetch:
    """A ticket: one object on its way into memory, locked there until it is released."""

    def __init__(self, shelf: LmcacheShelf, name: Any, blob: Blob) -> None:
        self._shelf, self._name, self._blob = shelf, name, blob
        self._tier = Tier.MEMORY
        self._released = self._given_up = False
        self._flight: _Flight | None = None
        """None once it came, and where there is none."""
        self._first = True
        """The flight's lock is this ticket's; others take one of their own."""
        # A task takes five times as long as looking into memory does.
        self._object = self._reserved()
        if self._object is None and shelf.has_slower():
            self._tier = shelf.slower(blob.key)
            self._flight, self._first = shelf.flight(name, blob)

    def done(self, timeout: float = 0.0) -> bool:
        flight = self._flight
        if flight is not None and flight.done(timeout):
            self._flight = None
            self._shelf.landed(self._name, flight)
            if flight.in_memory:
                self._tier = Tier.MEMORY  # it came in between
            if flight.came and self._first:
                self._object = self._shelf.manager.unsafe_read([self._name])[1][0]
            elif flight.came:
                self._object = self._reserved()
        return self._flight is None

    def code(self) -> Tensor | None:
        if self._object is None or self._released or len(self._object.tensor) != self._blob.size:
            return None
        code: Tensor = self._object.tensor
        return code

    @property
    def tier(self) -> Tier:
        return self._tier

    def release(self) -> None:
        if self._released:
            return
        if not self.done():
            if not self._given_up:
                self._given_up = True
                self._shelf.abandon(self)
            return
        self._released = True
        if self._object is not None:
            self._object = None
            self._shelf.manager.finish_read_prefetched([self._name])

    def _reserved(self) -> Any:
        return self._shelf.manager._l1_manager.reserve_read([self._name])[self._name][1]


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
            if path.suffix == ".tmp":
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


class _DiskConfig(FSL2AdapterConfig):  # type: ignore[misc]
    """LMCache's, and whom to tell."""

    def __init__(self, directory: Path, outcome: Outcome) -> None:
        super().__init__(str(directory))
        self.outcome = outcome


class _Disk(FSL2Adapter):  # type: ignore[misc]
    """LMCache's adapter for files, which says how writing went. One thread submits and collects."""

    def __init__(self, config: _DiskConfig) -> None:
        super().__init__(config)
        self._outcome = config.outcome
        self._underway: dict[int, list[Any]] = {}
        self._guard = threading.Lock()
        self._landed: set[Any] = set()
        """What was written since its task began."""

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        task: int = super().submit_store_task(keys, objects)
        self._underway[task] = list(keys)
        return task

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        completed: dict[int, Any] = super().pop_completed_store_tasks()
        for task, result in completed.items():
            keys = self._underway.pop(task, [])
            with self._guard:
                landed = self._landed.intersection(keys)
                self._landed -= landed
            # A task that failed may hold what was written well: several chunks share one when they come at once.
            failed = [] if result.is_successful() else [key for key in keys if key not in landed]
            self._outcome([key for key in keys if key not in failed], True)
            self._outcome(failed, False)
        return completed

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        with self._guard:
            self._landed.update(keys)
        super()._notify_keys_stored(keys, sizes)


class _RemoteConfig(L2AdapterConfigBase):  # type: ignore[misc]
    """A Redis, and whom to tell."""

    def __init__(self, url: str, outcome: Outcome) -> None:
        super().__init__()
        self.url, self.outcome = url, outcome

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> _RemoteConfig:
        raise NotImplementedError("only made by this file")

    @classmethod
    def help(cls) -> str:
        return "only made by hitpath"


class _Remote(L2AdapterInterface):  # type: ignore[misc]
    """Redis for LMCache: a few threads, each call bounded in time, each task answered."""

    def __init__(self, config: _RemoteConfig) -> None:
        super().__init__()
        self._outcome = config.outcome
        self._blobs = RedisBlobs(config.url)
        self._pool = ThreadPoolExecutor(_REMOTE_WORKERS, "kv-redis")
        self._guard = threading.Lock()
        self._tasks = 0
        self._stored: dict[int, Any] = {}
        self._looked: dict[int, Any] = {}
        self._loaded: dict[int, Any] = {}
        self._bells = {name: create_event_notifier() for name in ("store", "lookup", "load")}

    def get_store_event_fd(self) -> int:
        return int(self._bells["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._bells["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._bells["load"].fileno())

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        def store() -> Any:
            well = True
            for key, item in zip(keys, objects, strict=True):
                well &= self._blobs.set(_name(key), item.byte_array)
            self._outcome(keys, well)
            return L2StoreResult(well, sum(len(o.byte_array) for o in objects))

        return self._submit("store", self._stored, store, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        with self._guard:
            completed = dict(self._stored)
            self._stored.clear()
        return completed

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        def look() -> Any:
            return _bitmap(self._blobs.exists([_name(key) for key in keys]))

        return self._submit("lookup", self._looked, look, _bitmap([False] * len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        with self._guard:
            return self._looked.pop(task_id, None)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Nothing is locked in Redis: what it evicts meanwhile is absent."""

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        def load() -> Any:
            return _bitmap([self._blobs.get(_name(k), o.byte_array) for k, o in zip(keys, objects, strict=True)])

        return self._submit("load", self._loaded, load, _bitmap([False] * len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        with self._guard:
            return self._loaded.pop(task_id, None)

    def delete(self, keys: list[Any]) -> None:
        self._blobs.delete([_name(key) for key in keys])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._blobs.close()
        for bell in self._bells.values():
            bell.close()

    def _submit(self, kind: str, results: dict[int, Any], work: Callable[[], Any], otherwise: Any) -> int:
        with self._guard:
            task = self._tasks
            self._tasks += 1

        def run() -> None:
            result = otherwise
            try:
                result = work()
            except Exception:
                _log.exception("a task of the Redis tier failed")
            finally:
                with self._guard:
                    results[task] = result
                self._bells[kind].notify()

        self._pool.submit(run)
        return task


def _name(key: Any) -> bytes:
    return f"{key.model_name}:{key.cache_salt}:{key.chunk_hash.hex()}:{key.object_group_id}".encode()


def _bitmap(flags: Sequence[bool]) -> Any:
    bitmap = Bitmap(len(flags))
    for index, flag in enumerate(flags):
        if flag:
            bitmap.set(index)
    return bitmap


def _make_disk(config: Any, memory: Any = None) -> Any:
    return _Disk(config)


def _make_remote(config: Any, memory: Any = None) -> Any:
    return _Remote(config)


for _kind, _config, _make in (
    ("hitpath_disk", _DiskConfig, _make_disk),
    ("hitpath_redis", _RemoteConfig, _make_remote),
):
    register_l2_adapter_type(_kind, _config)
    register_l2_adapter_factory(_kind, _make)
