"""The log: every entry in one SQLite file in WAL mode. The truth, of which memory is a view.

All functions here block; the store calls them in its threads. One thread writes, any number read, each with a
connection of its own.
"""

from __future__ import annotations

import errno
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cachestore.entry import Document, Filter, Hit, Vector
from cachestore.errors import LogDamaged
from cachestore.migrations import check_format, migrate
from cachestore.rows import ANSWER_COLUMNS, Row, RowDamaged, decode_answer, decode_vector, unpack

logger = logging.getLogger("hitpath.store")

T = TypeVar("T")
FILE = "log.sqlite3"
_PAGE_SIZE = 8192
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_UNWRITABLE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}


class LogFull(Exception):
    """Nothing can be written for now: the disk is full or gone. Nothing of the transaction was kept."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What memory keeps of one entry."""

    id: int
    key: bytes
    scope: bytes
    category: str
    expires: float
    cost: float
    size: int
    hits: int
    used: float
    vector: Vector | None


@dataclass(frozen=True, slots=True)
class EntryRow:
    """One entry as an operator sees it."""

    id: int
    key: bytes
    scope: bytes
    namespace: str
    category: str
    model: str
    endpoint: str
    upstream: str
    text: str
    created: float
    expires: float
    cost: float
    hits: int
    size: int
    """Bytes on disk."""
    body: bytes | None = None
    """The answer, where it was asked for."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One entry for `check()`."""

    id: int
    key: bytes
    category: str
    size: int
    has_vector: bool


class Log:
    """One log file: a writer's connection and one for each reading thread."""

    def __init__(
        self, directory: Path, *, wal_bytes: int = 4 << 20, max_bytes: int | None = None, readonly: bool = False
    ) -> None:
        """Open, migrate and check. Raises NotOurLog, NewerLog, LogFull; LogDamaged only when opened for reading.

        The write-ahead log beside the file is folded back when it reaches `wal_bytes`. `max_bytes` makes SQLite itself
        refuse to grow beyond it, as a full disk would.
        """
        self.path = directory / FILE
        self._max_pages = max_bytes // _PAGE_SIZE if max_bytes else None
        self._wal_bytes = wal_bytes
        self._readonly = readonly
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._generation = 0
        self._lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self.moved_aside: list[Path] = []
        try:
            with _translated():
                self._open()
        except LogDamaged:
            if readonly:
                self.close()
                raise
            self.begin_anew()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self._readonly:
            check_format(self._reader(), self.path)
            return
        connection = self._connect()
        try:
            connection.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
            if connection.execute("PRAGMA page_count").fetchone()[0] == 0:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            else:
                check_format(connection, self.path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {max(1, self._wal_bytes // _PAGE_SIZE)}")
            connection.execute(f"PRAGMA journal_size_limit = {self._wal_bytes}")
            if self._max_pages is not None:
                connection.execute(f"PRAGMA max_page_count = {self._max_pages}")
            migrate(connection, self.path)
        except BaseException:
            connection.close()
            raise
        self._writer = connection

    def _connect(self) -> sqlite3.Connection:
        # The connections move between threads only to be closed.
        if self._readonly:
            uri = f"{self.path.absolute().as_uri()}?mode=ro"
            return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)

    def _reader(self) -> sqlite3.Connection:
        """This thread's connection; a new one when the file was replaced."""
        if getattr(self._local, "generation", None) != self._generation:
            with self._lock:
                # Each thread closes its own: closing a connection that another thread is using is not safe.
                if old := getattr(self._local, "connection", None):
                    self._readers.remove(old)
                    old.close()
                connection = self._connect()
                connection.create_function("holds", 4, _holds, deterministic=True)
                self._readers.append(connection)
                self._local.connection, self._local.generation = connection, self._generation
        reader: sqlite3.Connection = self._local.connection
        return reader

    @property
    def _write(self) -> sqlite3.Connection:
        if self._writer is None:
            raise sqlite3.ProgrammingError("the log is closed or open for reading only")
        return self._writer

    def close(self) -> None:
        """Close every connection, once no thread reads any more; the last folds the WAL back into the file."""
        with self._lock:
            for connection in self._readers:
                connection.close()
            self._readers.clear()
        self._close_writer()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def begin_anew(self) -> Path:
        """Move a broken file aside and begin an empty one; returns where it went. For the writer's thread."""
        self._close_writer()
        aside = self.path.with_name(
            f"{self.path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**6:06d}"
        )
        with self._lock:
            # The write-ahead log first: it must never meet a new file of the old name.
            for suffix in ("-wal", "-shm", ""):
                part = self.path.with_name(self.path.name + suffix)
                if part.exists():
                    part.rename(aside.with_name(aside.name + suffix))
            self._generation += 1
        logger.error("%s is damaged: moved to %s, beginning an empty log", self.path, aside)
        self.moved_aside.append(aside)
        with _translated():
            self._open()
        return aside

    # The writer's thread

    def apply(self, dead: Sequence[int], rows: Sequence[Row]) -> list[tuple[int, int | None]]:
        """Delete and insert in one transaction; returns each row's id and the id of the entry that it replaced, if any.

        Raises LogFull, LogDamaged: then nothing was changed.
        """
        with self._transaction() as connection:
            _delete(connection, dead)
            return [_insert(connection, row) for row in rows]

    def purge(self, filter: Filter) -> list[int]:
        """Delete what the filter means; returns the ids. Raises LogFull, LogDamaged."""
        with self._transaction() as connection:
            connection.create_function("holds", 4, _holds, deterministic=True)
            ids = _matching(connection, filter)
            _delete(connection, ids)
        self._give_back_pages()
        return ids

    def note_hits(self, hits: Sequence[tuple[int, float, int]]) -> None:
        """Add to the counters of `(hits, last used, id)`."""
        with self._transaction() as connection:
            connection.executemany("UPDATE entry SET hits = hits + ?, used = ? WHERE id = ?", hits)

    def _give_back_pages(self) -> None:
        """Shrink the file by some of its free pages, so that a purge frees the disk too."""
        with _translated():
            self._write.execute("PRAGMA incremental_vacuum(4096)").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._write
        with _translated():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    # Readers

    def used_bytes(self) -> int:
        """Bytes of the file's pages that hold something."""
        with _translated():
            connection = self._reader()
            pages, free, size = (
                int(connection.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size

    def find(self, key: bytes) -> Hit | None:
        """The answer under a key. Raises RowDamaged (with the id as its second argument), LogDamaged."""
        return self._answer("key", key)

    def read(self, id: int) -> Hit | None:
        """The answer of an id. Raises as `find`."""
        return self._answer("id", id)

    def _answer(self, column: str, value: bytes | int) -> Hit | None:
        with _translated():
            query = f"SELECT {ANSWER_COLUMNS} FROM entry LEFT JOIN payload USING (id) WHERE {column} = ?"
            row = self._reader().execute(query, (value,)).fetchone()
        if row is None:
            return None
        try:
            return decode_answer(row)
        except RowDamaged as error:
            raise RowDamaged(str(error), row[0]) from error

    def last_id(self) -> int:
        """The highest id given so far."""
        with _translated():
            return int(self._reader().execute("SELECT coalesce(max(id), 0) FROM entry").fetchone()[0])

    def load(self, after: int, upto: int, limit: int) -> tuple[list[Loaded], list[int]]:
        """The next entries by id, and the ids of damaged ones among them; both empty at the end."""
        query = """SELECT id, key, scope, category, created, expires, cost, size, hits, used, vector, vector_sum
            FROM entry LEFT JOIN payload USING (id) WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"""
        with _translated():
            rows = self._reader().execute(query, (after, upto, limit)).fetchall()
        whole, damaged = [], []
        for id_, key, scope, category, created, expires, cost, size, hits, used, blob, expected in rows:
            try:
                vector = decode_vector(key, scope, category, created, expires, blob, expected)
                whole.append(
                    Loaded(id_, key, scope, category, expires, float(cost), int(size), int(hits), float(used), vector)
                )
            except (RowDamaged, TypeError, ValueError):
                damaged.append(id_)
        return whole, damaged

    def select(self, filter: Filter) -> list[int]:
        """Ids that a filter means, ascending."""
        with _translated():
            return _matching(self._reader(), filter)

    def entries(self, filter: Filter, *, limit: int, offset: int = 0, bodies: bool = False) -> list[EntryRow]:
        """What a filter means, newest first; damaged bodies come as None."""
        where, arguments = _where(filter)
        query = f"""SELECT id, key, scope, namespace, category, model, endpoint, upstream, text, created, expires, cost,
            hits, size, packed, {"body" if bodies else "NULL"}
            FROM entry JOIN payload USING (id) WHERE {where} ORDER BY id DESC LIMIT ? OFFSET ?"""
        with _translated():
            rows = self._reader().execute(query, (*arguments, limit, offset)).fetchall()
        return [EntryRow(*(*row[:-2], _body_or_none(*row[-2:]))) for row in rows]

    def documents(self, ids: Sequence[int]) -> list[Document]:
        """Whole entries; damaged and unknown ones are left out."""
        found = []
        for id_ in ids:
            with _translated():
                row = self._reader().execute("SELECT namespace, model FROM entry WHERE id = ?", (id_,)).fetchone()
            entries, _ = self.load(id_ - 1, id_, 1)
            try:
                hit = self.read(id_)
            except RowDamaged:
                continue
            if row is not None and hit is not None and entries:
                found.append(_document(entries[0], hit, *row))
        return found

    def summaries(self) -> list[Summary]:
        """Every entry, for `check()`."""
        query = "SELECT id, key, category, size, vector IS NOT NULL FROM entry LEFT JOIN payload USING (id) ORDER BY id"
        with _translated():
            rows = self._reader().execute(query).fetchall()
        return [Summary(id_, key, category, size, bool(vector)) for id_, key, category, size, vector in rows]

    def problems(self) -> list[str]:
        """Everything wrong inside the file: SQLite's own check, rows without their other half, checksums."""
        with _translated():
            found = [
                f"{self.path}: {line}" for (line,) in self._reader().execute("PRAGMA integrity_check") if line != "ok"
            ]
            halves = """SELECT id FROM entry WHERE id NOT IN (SELECT id FROM payload)
                UNION SELECT id FROM payload WHERE id NOT IN (SELECT id FROM entry)"""
            found += [f"entry {id_} is half there" for (id_,) in self._reader().execute(halves)]
            ids = [id_ for (id_,) in self._reader().execute("SELECT id FROM entry ORDER BY id")]
        return found + [problem for id_ in ids if (problem := self._problem(id_))]

    def _problem(self, id: int) -> str | None:
        try:
            self.read(id)
        except RowDamaged as error:
            return str(error.args[0])
        return f"entry {id}: checksum of the vector" if self.load(id - 1, id, 1)[1] else None


def _document(entry: Loaded, hit: Hit, namespace: str, model: str) -> Document:
    return Document(
        key=entry.key,
        scope=entry.scope,
        namespace=namespace,
        category=hit.category,
        model=model,
        endpoint=hit.endpoint,
        upstream=hit.upstream,
        text=hit.text,
        body=hit.body,
        created=hit.created,
        expires=hit.expires,
        cost=entry.cost,
        vector=entry.vector,
    )


def _insert(connection: sqlite3.Connection, row: Row) -> tuple[int, int | None]:
    replaced = connection.execute("SELECT id FROM entry WHERE key = ?", (row.key,)).fetchone()
    if replaced is not None:
        _delete(connection, replaced)
    cursor = connection.execute(
        """INSERT INTO entry
        (key, scope, namespace, category, model, endpoint, upstream, created, expires, cost, size, used)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            row.key,
            row.scope,
            row.namespace,
            row.category,
            row.model,
            row.endpoint,
            row.upstream,
            row.created,
            row.expires,
            row.cost,
            row.size,
            row.created,
        ),
    )
    id_ = cursor.lastrowid
    assert id_ is not None
    connection.execute(
        "INSERT INTO payload (id, vector, vector_sum, packed, answer_sum, text, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (id_, row.vector, row.vector_sum, row.packed, row.answer_sum, row.text, row.body),
    )
    return id_, None if replaced is None else replaced[0]


def _delete(connection: sqlite3.Connection, ids: Sequence[int]) -> None:
    connection.executemany("DELETE FROM entry WHERE id = ?", ((id_,) for id_ in ids))
    connection.executemany("DELETE FROM payload WHERE id = ?", ((id_,) for id_ in ids))


def _where(filter: Filter) -> tuple[str, list[str | int]]:
    terms, arguments = ["1"], list[str | int]()
    for column in ("category", "model"):
        if (value := getattr(filter, column)) is not None:
            terms.append(f"{column} = ?")
            arguments.append(value)
    if filter.namespace is not None:
        inside = f"{filter.namespace}/"
        terms.append("(namespace = ? OR substr(namespace, 1, ?) = ?)")
        arguments += [filter.namespace, len(inside), inside]
    if filter.ids:
        # As one JSON argument: the number of placeholders and the length of a statement are limited.
        terms.append("id IN (SELECT value FROM json_each(?))")
        arguments.append(json.dumps(filter.ids))
    if filter.contains is not None:
        terms.append("holds(text, packed, body, ?)")
        arguments.append(filter.contains.casefold())
    return " AND ".join(terms), arguments


def _matching(connection: sqlite3.Connection, filter: Filter) -> list[int]:
    where, arguments = _where(filter)
    source = "entry JOIN payload USING (id)" if filter.contains is not None else "entry"
    return [id_ for (id_,) in connection.execute(f"SELECT id FROM {source} WHERE {where} ORDER BY id", arguments)]


def _holds(text: str, packed: int, body: bytes, needle: str) -> bool:
    if needle in text.casefold():
        return True
    whole = _body_or_none(packed, body) or b""
    plain = whole.decode("utf-8", "replace")
    if "\\u" in plain:
        # JSON may spell any letter as an escape; the operator looks for the letter.
        plain = plain.encode("latin-1", "backslashreplace").decode("unicode_escape", "replace")
    return needle in plain.casefold()


def _body_or_none(packed: int, body: bytes | None) -> bytes | None:
    if body is None or not packed:
        return body
    try:
        return unpack(body)
    except Exception:  # any garbage may lie in a damaged row; `verify` names it
        return None


@contextmanager
def _translated() -> Iterator[None]:
    """SQLite's errors that mean something to the store, as its own."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _BROKEN:
            raise LogDamaged(str(error)) from error
        if code in _UNWRITABLE:
            raise LogFull(str(error)) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LogFull(str(error)) from error
        raise
