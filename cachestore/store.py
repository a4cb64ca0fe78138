"""The store's door: answers by key, by meaning and by id, kept on disk first and remembered after.

Who owns what: the event loop's thread owns the view (memory) and takes every decision; one thread writes the log; two
threads read it. An entry becomes visible in memory only after its transaction, and disappears from memory before
(eviction, expiry) or right after (purge, replacement) its row does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from cachestore.entry import Document, Filter, Hit, Neighbour, Vector
from cachestore.errors import LogDamaged, StoreError
from cachestore.lock import DirectoryLock
from cachestore.log import EntryRow, Loaded, Log, LogFull
from cachestore.options import StoreOptions, StoreStats
from cachestore.rows import Row, RowDamaged, encode
from cachestore.vectors import Pour
from cachestore.view import Hits, View, footprint
from policies.eviction import Evictor
from policies.reasons import NotStored

logger = logging.getLogger("hitpath.store")

T = TypeVar("T")
_CHUNK = 128
"""Rows handled between two turns of the event loop while loading or sweeping: about a millisecond."""
_GROUP = 128
"""Documents in one transaction at most."""
_ALONE, _BRIEF = 2, 16 * 2**10
"""Documents, and bytes of their bodies, that are encoded on the event loop: a tenth of a millisecond."""
_SWEEP_EVERY = 1.0
_NOTE_HITS_EVERY = 30.0
_NOTES_MAX = 10_000


def _is_well_formed(document: Document) -> bool:
    """Whether the log can keep it: what a caller got wrong must not fail the others of its transaction."""
    return (
        len(document.key) == 16
        and len(document.scope) in (0, 16)
        and all(map(math.isfinite, (document.created, document.expires, document.cost)))
        and (document.vector is None or document.vector.ndim == 1)
    )


@dataclass(slots=True)
class _Waiting:
    """A document in the queue, and whoever waits for its id."""

    document: Document
    done: asyncio.Future[int | NotStored]

    def settle(self, outcome: int | NotStored) -> None:
        """Answer, unless the caller has gone; the document is kept or refused all the same."""
        if not self.done.done():
            self.done.set_result(outcome)


class Store:
    """See the module's docstring. Made by `open`; every method belongs to the event loop that opened it."""

    def __init__(self, directory: Path, options: StoreOptions, evictor: Evictor, clock: Callable[[], float]) -> None:
        self.directory = directory
        self.options = options
        self.loaded = asyncio.Event()
        """Set once memory knows every entry of the log."""
        self._clock = clock
        self._view = View(options, evictor)
        self._hot = self._view.hot.get
        self._writer = ThreadPoolExecutor(1, "store-writer")
        self._readers = ThreadPoolExecutor(2, "store-reader")
        self._indexer = ThreadPoolExecutor(1, "store-index")
        self._unpoured = asyncio.Event()
        self._queue: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self._deleting: set[int] = set()
        self._gone: set[int] = set()
        self._hit_notes: list[Hits] = []
        self._hits_noted_at = clock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._off_until = 0.0
        self._off_reason: str | None = None
        self._closed = False
        self._hits = self._stored = self._evicted = self._expired = self._damaged = 0
        self._moved_aside: list[str] = []

    @classmethod
    async def open(
        cls, directory: Path, options: StoreOptions, *, eviction: Evictor, clock: Callable[[], float] = time.time
    ) -> Self:
        """Open or create the log in a directory and begin to load it.

        Returns as soon as lookups by key work. Raises StoreError: the directory is in use, the log is of another
        program or of a newer version, or cannot be written at all.
        """
        store = cls(directory, options, eviction, clock)
        try:
            await store._start()
        except BaseException:
            store._writer.shutdown()
            store._readers.shutdown()
            store._indexer.shutdown()
            raise
        return store

    async def _start(self) -> None:
        self._lock = await self._in(self._writer, lambda: DirectoryLock(self.directory))
        try:
            self._log, upto, used = await self._in(self._writer, self._open_log)
        except LogFull as error:
            self._lock.release()
            raise StoreError(f"{self.directory} cannot be written: {error}") from error
        except BaseException:
            self._lock.release()
            raise
        self._moved_aside += map(str, self._log.moved_aside)
        self._view.measured(used)
        self._spawn(self._load(upto))
        self._spawn(self._write_loop())
        self._spawn(self._sweep_loop())
        self._spawn(self._pour_loop())

    def _open_log(self) -> tuple[Log, int, int]:
        log = Log(self.directory, wal_bytes=self.options.wal_bytes, max_bytes=self.options.max_file)
        try:
            return log, log.last_id(), log.used_bytes()
        except LogDamaged:
            log.begin_anew()
            return log, 0, log.used_bytes()

    # Lookups

    def hot(self, key: bytes) -> Hit | None:
        """The answer under a key if its body is in memory; nothing faster exists here."""
        body = self._hot(key)
        if body is None or body.hit.expires <= self._clock():
            return None
        self._view.count_hit(key, body)
        self._hits += 1
        return body.hit

    async def get(self, key: bytes, *, grace: float = 0.0) -> Hit | None:
        """The answer under a key, from memory or from the log, up to `grace` seconds after it expired."""
        hit = self.hot(key)
        if hit is not None:
            return hit
        slot = self._view.table.find(key)
        if slot is None and self.loaded.is_set():
            return None
        if slot is not None and self._view.table.expires[slot] + grace <= self._clock():
            return None
        return self._found(key, await self._read(lambda: self._log.find(key)), grace)

    async def fetch(self, id: int) -> Hit | None:
        """The answer of an entry that a search named."""
        slot = self._view.table.slot_of(id)
        if slot is None:
            return None
        key = self._view.table.key_of(slot)
        hit = self.hot(key)
        if hit is not None and hit.id == id:
            return hit
        if self._view.table.expires[slot] <= self._clock():
            return None
        return self._found(key, await self._read(lambda: self._log.read(id)), 0.0)

    def known(self, key: bytes) -> int | None:
        """The id of the entry under a key, as far as memory knows it; counts nothing."""
        slot = self._view.table.find(key)
        return None if slot is None else int(self._view.table.id[slot])

    async def peek(self, id: int) -> Hit | None:
        """The answer of an entry, for those who only look: nothing is counted, nothing kept in memory."""
        slot = self._view.table.slot_of(id)
        if slot is None or self._view.table.expires[slot] <= self._clock():
            return None
        hit = await self._read(lambda: self._log.read(id))
        return None if hit is None or self._view.table.slot_of(id) is None else hit

    def _found(self, key: bytes, hit: Hit | None, grace: float) -> Hit | None:
        """What became of an answer while it was read: expired, forgotten, or to be kept in memory."""
        now = self._clock()
        if hit is None or hit.expires + grace <= now or hit.id in self._deleting or hit.id in self._gone:
            return None
        known = self._view.table.slot_of(hit.id) is not None
        if not known and self.loaded.is_set():
            return None
        self._hits += 1
        body = self._view.keep_hot(key, hit, now) if hit.expires > now else None
        if body is not None:
            self._view.count_hit(key, body)
        else:
            self._hit_notes.append(self._view.count_cold_hit(hit.id, now))
        return hit

    def has_scope(self, scope: bytes) -> bool:
        """Whether there is anything to compare with."""
        return self._view.index.has(scope)

    def search(self, scope: bytes, vector: Vector, k: int, floor: float) -> list[Neighbour]:
        """Up to k entries of a scope with a cosine of at least `floor`, most similar first.

        `vector`: [dim], unit length; one of another dimension than the scope's finds nothing.
        """
        return self._view.search(scope, vector, k, floor, self._clock())

    async def _read(self, query: Callable[[], Hit | None]) -> Hit | None:
        """Ask the log; whatever goes wrong there is a miss here."""
        log_generation = len(self._moved_aside)
        try:
            return await self._in(self._readers, query)
        except RowDamaged as error:
            self._drop_damaged(error.args[1], str(error.args[0]))
        except LogDamaged as error:
            self._spawn(self._begin_anew(log_generation, error))
        except (sqlite3.Error, LogFull) as error:
            logger.warning("%s cannot be read: %s", self._log.path, error)
        return None

    # Storing

    async def put(self, document: Document) -> int | NotStored:
        """Store a complete answer; returns its id once it is committed, or why it is not kept.

        An entry of the same key is replaced in the same transaction. If the caller is cancelled, the document is
        stored whole or not at all. A document with a key that is not 16 bytes long or a time that is not finite is
        refused as malformed.
        """
        refusal = self._refusal(document)
        if refusal is not None:
            return refusal
        waiting = _Waiting(document, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._wake.set()
        return await waiting.done

    def _refusal(self, document: Document) -> NotStored | None:
        if self._closed:
            return NotStored.STORE_FAILED
        if len(document.body) > self.options.max_body:
            return NotStored.TOO_LARGE
        if not _is_well_formed(document):
            return NotStored.MALFORMED
        if document.expires <= self._clock():
            return NotStored.EXPIRED_AT_ONCE
        if self._off_reason is not None and time.monotonic() < self._off_until:
            return NotStored.DISK_FULL
        if len(self._queue) >= self.options.max_waiting:
            return NotStored.STORE_BUSY
        return None

    async def _write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue or self._deleting:
                async with self._turn:
                    if not await self._write_group():
                        break

    async def _write_group(self) -> bool:
        """Commit the next documents of the queue and what is to be deleted. The turn must be held.

        Returns whether the log took it.
        """
        group = self._next_group()
        try:
            rows = await self._encoded([waiting.document for waiting in group])
            admitted = self._admit(group, rows)
            return await self._commit(admitted)
        except Exception:
            logger.exception("a group of %d documents was not stored", len(group))
            self._view.measured(self._view.disk_used())
            for waiting in group:
                waiting.settle(NotStored.STORE_FAILED)
            return False

    async def _encoded(self, documents: Sequence[Document]) -> list[Row]:
        """Few bytes at once, which takes less than the way to the writer's thread and back; many there."""
        if len(documents) <= _ALONE and sum(len(document.body) for document in documents) <= _BRIEF:
            return [encode(document) for document in documents]
        return await self._in(self._writer, lambda: [encode(document) for document in documents])

    def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        size = 0
        while self._queue and len(group) < _GROUP and size < self.options.group_bytes:
            waiting = self._queue.popleft()
            size += len(waiting.document.body)
            group.append(waiting)
        return group

    def _admit(self, group: list[_Waiting], rows: list[Row]) -> list[tuple[_Waiting, Row]]:
        """Make room for each; refuse those for which the quotas have none."""
        admitted = []
        for waiting, row in zip(group, rows, strict=True):
            granted, doomed = self._view.plan(
                row.category, memory=footprint(waiting.document.vector), disk=row.size, now=self._clock()
            )
            self._evicted += len(doomed)
            self._doom(doomed)
            if granted:
                admitted.append((waiting, row))
            else:
                waiting.settle(NotStored.OVER_QUOTA)
        return admitted

    async def _commit(self, admitted: list[tuple[_Waiting, Row]]) -> bool:
        deleting = list(self._deleting)
        try:
            ids, used = await self._in(self._writer, lambda: self._apply(deleting, [row for _, row in admitted]))
        except LogFull as error:
            self._turn_off(error)
            self._view.measured(self._view.disk_used())
            for waiting, _ in admitted:
                waiting.settle(NotStored.DISK_FULL)
            return False
        except LogDamaged as error:
            await self._replace_log(error)
            return await self._commit(admitted)
        self._off_reason = None
        self._deleting.difference_update(deleting)
        self._view.measured(used)
        for (waiting, row), (id_, replaced) in zip(admitted, ids, strict=True):
            self._remember(waiting.document, row, id_, replaced)
            waiting.settle(id_)
        return True

    def _apply(self, dead: list[int], rows: list[Row]) -> tuple[list[tuple[int, int | None]], int]:
        return self._log.apply(dead, rows), self._log.used_bytes()

    def _remember(self, document: Document, row: Row, id: int, replaced: int | None) -> None:
        """The entry is committed: now memory may know of it."""
        now = self._clock()
        self._forget(replaced)
        entry = Loaded(
            id, row.key, row.scope, row.category, row.expires, row.cost, row.size, 0, row.created, document.vector
        )
        self._view.remember(entry, now)
        hit = Hit(
            id,
            document.body,
            row.created,
            row.expires,
            row.category,
            row.endpoint,
            row.upstream,
            row.text,
            row.cost,
        )
        self._view.keep_hot(row.key, hit, now)
        self._stored += 1
        self._unpoured.set()

    def _forget(self, id: int | None) -> None:
        """Drop an entry whose row is gone."""
        if id is None:
            return
        if not self.loaded.is_set():
            self._gone.add(id)
        slot = self._view.table.slot_of(id)
        if slot is not None:
            self._view.forget(slot)

    def _doom(self, ids: list[int]) -> None:
        """Memory forgot these; the next transaction deletes them."""
        self._deleting.update(ids)
        if not self.loaded.is_set():
            self._gone.update(ids)

    def _turn_off(self, error: LogFull) -> None:
        if self._off_reason is None:
            logger.error("storing is off, serving goes on: %s: %s", self._log.path, error)
        self._off_reason = str(error)
        self._off_until = time.monotonic() + self.options.retry_after

    # Operators

    async def purge(self, filter: Filter, *, dry_run: bool = False) -> list[int]:
        """Delete what a filter means; returns the ids. Durable, and forgotten by the index, before it returns.

        Raises StoreError when the log cannot be written.
        """
        if dry_run:
            return await self._ask(lambda: self._log.select(filter))
        return await asyncio.shield(self._spawn(self._purge(filter)))

    async def _purge(self, filter: Filter) -> list[int]:
        async with self._turn:
            # What was put before the purge is judged by it.
            while self._queue and await self._write_group():
                pass
            try:
                ids, used = await self._in(self._writer, lambda: (self._log.purge(filter), self._log.used_bytes()))
            except LogDamaged as error:
                await self._replace_log(error)
                return []
            except (LogFull, sqlite3.Error) as error:
                raise StoreError(f"{self._log.path} cannot be written: {error}") from error
            for start in range(0, len(ids), _CHUNK):
                for id_ in ids[start : start + _CHUNK]:
                    self._forget(id_)
                await asyncio.sleep(0)
            self._view.measured(used)
            self._unpoured.set()
            return [id_ for id_ in ids if id_ not in self._deleting]

    async def entries(self, filter: Filter, *, limit: int, offset: int = 0, bodies: bool = False) -> list[EntryRow]:
        """What a filter means, newest first, without vectors; answers only if `bodies`. Raises StoreError."""
        return await self._ask(lambda: self._log.entries(filter, limit=limit, offset=offset, bodies=bodies))

    async def _ask(self, query: Callable[[], T]) -> T:
        try:
            return await self._in(self._readers, query)
        except (sqlite3.Error, LogDamaged, LogFull) as error:
            raise StoreError(f"{self._log.path} cannot be read: {error}") from error

    def charge(self, kind: str, delta: int) -> None:
        """Count bytes that others hold (streams in flight) against the memory budget; negative when they let go."""
        self._view.charged[kind] += delta
        if delta > 0:
            self._view.trim_hot(self._clock())

    def stats(self) -> StoreStats:
        """Counts and bytes; cheap."""
        view = self._view
        return StoreStats(
            entries=len(view.table),
            scopes=len(view.index),
            loaded=self.loaded.is_set(),
            memory_used=view.memory_used(),
            memory_budget=self.options.memory_budget,
            memory_by_kind={
                "entries": view.table.memory_by_category.total(),
                "hot": view.hot.bytes,
                **{kind: held for kind, held in view.charged.items() if held},
            },
            memory_by_category={name: held for name, held in view.table.memory_by_category.items() if held},
            disk_used=view.disk_used(),
            disk_budget=self.options.disk_budget,
            disk_by_category={name: held for name, held in view.table.disk_by_category.items() if held},
            hot_bodies=len(view.hot),
            hits=self._hits,
            stored=self._stored,
            evicted=self._evicted,
            expired=self._expired,
            damaged=self._damaged,
            waiting=len(self._queue),
            storing_off=self._off_reason,
            moved_aside=tuple(self._moved_aside),
        )

    async def check(self) -> list[str]:
        """Rows against index against byte counters, once everything is loaded; empty when all is well."""
        await self.loaded.wait()
        async with self._turn:
            rows = await self._ask(self._log.summaries)
            return self._view.check(rows, self._deleting)

    # Housekeeping

    async def sweep(self) -> None:
        """Forget what expired, keep the budgets, pass on hits. Runs every second by itself."""
        now = self._clock()
        while expired := self._view.unindex_expired(now, _CHUNK):
            logger.debug("%d expired entries left the index", expired)
            await asyncio.sleep(0)
        while notes := self._view.collect_hits(_CHUNK, now):
            self._hit_notes += notes
            await asyncio.sleep(0)
        if self.loaded.is_set():
            await self._relieve(now)
        if now - self._hits_noted_at >= _NOTE_HITS_EVERY or len(self._hit_notes) >= _NOTES_MAX:
            self._hits_noted_at = now
            await self._note_hits()

    async def _relieve(self, now: float) -> None:
        """Delete what is beyond its grace and what the budgets do not allow: they may be smaller than last time."""
        while slots := self._view.table.expired(now - self.options.stale_grace, _CHUNK):
            self._expired += len(slots)
            self._doom([self._view.forget(slot) for slot in slots])
            await asyncio.sleep(0)
        self._relieve_at(now)
        if self._deleting:
            async with self._turn:
                await self._write_group()
            self._unpoured.set()

    @property
    def pouring(self) -> bool:
        """Whether vectors of large scopes are still searched flat and on their way into graphs."""
        return self._view.index.unsettled

    def _relieve_at(self, now: float) -> None:
        _, doomed = self._view.relieve(now)
        self._evicted += len(doomed)
        self._doom(doomed)

    async def _pour_loop(self) -> None:
        """Keep large scopes in graphs, in small steps in a thread of their own."""
        while True:
            await self._unpoured.wait()
            self._unpoured.clear()
            try:
                await self._pour()
            except Exception:
                # What is not in a graph is searched flat: slower, but right. The next commit tries again.
                logger.exception("a large scope was not indexed")

    async def _pour(self) -> None:
        index = self._view.index
        pour: Pour | None = None
        while index.retire_some() or (pour := index.next_pour()) is not None:
            if pour is not None:
                await self._in(self._indexer, pour.run)
                index.finish(pour)
                pour = None
            await asyncio.sleep(0)

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY)
            try:
                await self.sweep()
            except Exception:
                logger.exception("sweeping failed; trying again")

    async def _note_hits(self) -> None:
        notes, self._hit_notes = self._hit_notes, []
        if not notes:
            return
        async with self._turn:
            try:
                await self._in(self._writer, lambda: self._log.note_hits([(n.count, n.last, n.id) for n in notes]))
            except LogFull as error:
                self._turn_off(error)
            except LogDamaged as error:
                await self._replace_log(error)

    # Loading

    async def _load(self, upto: int) -> None:
        """Fill memory from the log, a chunk at a time; what happens meanwhile comes first."""
        log_generation = len(self._moved_aside)
        try:
            await self._load_chunks(upto)
        except LogDamaged as error:
            await self._begin_anew(log_generation, error)
        except Exception:
            # Without the table every lookup goes to the log: slower, but right.
            logger.exception("%s could not be loaded", self._log.path)
            return
        self.loaded.set()
        self._gone.clear()

    async def _load_chunks(self, upto: int) -> None:
        after, log_generation = 0, len(self._moved_aside)
        while after < upto and log_generation == len(self._moved_aside):
            position = after
            rows, damaged = await self._in(self._readers, lambda: self._log.load(position, upto, _CHUNK))  # noqa: B023
            if not rows and not damaged:
                return
            if log_generation != len(self._moved_aside):
                return
            now = self._clock()
            for id_ in damaged:
                self._drop_damaged(id_, f"entry {id_}: checksum of the vector")
            for row in rows:
                if row.id not in self._gone and self._view.table.find(row.key) is None:
                    self._view.remember(row, now)
            self._relieve_at(now)
            self._unpoured.set()
            after = max([row.id for row in rows] + damaged)

    def _drop_damaged(self, id: int, problem: str) -> None:
        slot = self._view.table.slot_of(id)
        if id in self._gone or (slot is None and self.loaded.is_set()):
            return  # it is dropped already: whoever read it at the same time may be late
        self._damaged += 1
        logger.error("%s: %s; it is deleted", self._log.path, problem)
        if slot is not None:
            self._view.forget(slot)
        self._doom([id])
        self._wake.set()

    async def _begin_anew(self, log_generation: int, error: LogDamaged) -> None:
        async with self._turn:
            if log_generation == len(self._moved_aside):
                await self._replace_log(error)

    async def _replace_log(self, error: LogDamaged) -> None:
        """The file is broken: put it aside, begin an empty one, forget everything. The turn must be held."""
        logger.error("%s: %s", self._log.path, error)
        aside = await self._in(self._writer, self._log.begin_anew)
        self._moved_aside.append(str(aside))
        for slot in list(self._view.table):
            self._view.forget(slot)
        self._deleting.clear()
        self._view.measured(0)

    # Ending

    async def close(self) -> None:
        """Write what waits, then let go of everything. Later calls of `put` are refused."""
        if self._closed:
            return
        self._closed = True
        async with self._turn:
            while (self._queue or self._deleting) and await self._write_group():
                pass
        self._hit_notes += self._view.collect_hits(1 << 30, self._clock())
        await self._note_hits()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._in(self._writer, self._stop_threads)
        self._writer.shutdown()
        self._lock.release()

    def _stop_threads(self) -> None:
        self._readers.shutdown()
        self._indexer.shutdown()
        self._log.close()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @staticmethod
    async def _in(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, partial(work))
