"""A data directory without a store: reading beside a running gateway, and repairing, exporting, importing without one.

All functions block.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cachestore.entry import Document, Filter, Vector
from cachestore.errors import LogDamaged, StoreError
from cachestore.lock import DirectoryLock
from cachestore.log import FILE, EntryRow, Log, LogFull
from cachestore.rows import encode

_BATCH = 256


@dataclass(frozen=True, slots=True)
class LogStats:
    """What a log holds."""

    entries: int
    disk_used: int
    by_category: dict[str, tuple[int, int]]
    """Entries and their bytes."""


@dataclass(frozen=True, slots=True)
class Import:
    """What became of an import."""

    stored: int
    expired: int
    problems: list[str]
    """Lines that were skipped, with their numbers."""


def verify(directory: Path) -> list[str]:
    """Everything that is wrong with a log: its format, its pages, its rows. Also beside a running gateway."""
    try:
        with reading(directory) as log:
            return log.problems()
    except (StoreError, LogDamaged) as error:
        return [f"{directory / FILE}: {error}"]


@contextmanager
def reading(directory: Path) -> Iterator[Log]:
    """A log for reading only; a gateway may run beside. Raises StoreError, and LogDamaged while it is read."""
    if not (directory / FILE).exists():
        raise StoreError(f"{directory} holds no log: there is no {FILE} in it")
    try:
        log = Log(directory, readonly=True)
    except (LogDamaged, LogFull) as error:
        raise StoreError(f"{directory / FILE} cannot be read: {error}") from error
    try:
        yield log
    finally:
        log.close()


@contextmanager
def writing(directory: Path) -> Iterator[Log]:
    """A log for writing, when no gateway runs. Raises StoreLocked and other StoreErrors."""
    lock = DirectoryLock(directory)
    try:
        log = Log(directory)
        try:
            yield log
        finally:
            log.close()
    except (LogDamaged, LogFull) as error:
        raise StoreError(f"{directory / FILE} cannot be written: {error}") from error
    finally:
        lock.release()


def entries(directory: Path, filter: Filter, *, limit: int, offset: int = 0, bodies: bool = False) -> list[EntryRow]:
    """What a filter means, newest first. Raises StoreError."""
    with reading(directory) as log:
        return log.entries(filter, limit=limit, offset=offset, bodies=bodies)


def stats(directory: Path) -> LogStats:
    """Counts and bytes of a log. Raises StoreError."""
    with reading(directory) as log:
        by_category: dict[str, tuple[int, int]] = {}
        rows = log.summaries()
        for row in rows:
            count, size = by_category.get(row.category, (0, 0))
            by_category[row.category] = count + 1, size + row.size
        return LogStats(len(rows), log.used_bytes(), by_category)


def purge(directory: Path, filter: Filter, *, dry_run: bool = False) -> list[int]:
    """Delete what a filter means; returns the ids. Raises StoreLocked beside a gateway, unless it is a dry run."""
    if dry_run:
        with reading(directory) as log:
            return log.select(filter)
    with writing(directory) as log:
        return log.purge(filter)


def export_entries(directory: Path, out: TextIO, filter: Filter | None = None) -> int:
    """Write entries as JSON lines, oldest first, vectors as base64 of float32; returns how many.

    Damaged ones are left out (`verify` names them). Raises StoreError.
    """
    count = 0
    with reading(directory) as log:
        wanted = log.select(filter or Filter())
        for start in range(0, len(wanted), _BATCH):
            for document in log.documents(wanted[start : start + _BATCH]):
                out.write(json.dumps(_to_json(document), ensure_ascii=False) + "\n")
                count += 1
    return count


def import_entries(directory: Path, lines: Iterable[str]) -> Import:
    """Store what `export_entries` wrote; entries of the same key are replaced, expired ones left out.

    A line that is not an entry is skipped and reported. Raises StoreLocked, StoreError.
    """
    stored = expired = 0
    problems: list[str] = []
    with writing(directory) as log:
        batch: list[Document] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                document = _from_json(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                problems.append(f"line {number}: {type(error).__name__}: {error}")
                continue
            if document.expires <= time.time():
                expired += 1
                continue
            batch.append(document)
            if len(batch) == _BATCH:
                stored += _store(log, batch)
        stored += _store(log, batch)
    return Import(stored, expired, problems)


def _store(log: Log, batch: list[Document]) -> int:
    log.apply([], [encode(document) for document in batch])
    count = len(batch)
    batch.clear()
    return count


_TEXTS = ("namespace", "category", "model", "endpoint", "upstream", "text")
_NUMBERS = ("created", "expires", "cost")


def _to_json(document: Document) -> dict[str, Any]:
    vector = None if document.vector is None else base64.b64encode(document.vector.tobytes()).decode()
    return {
        "key": document.key.hex(),
        "scope": document.scope.hex(),
        **{name: getattr(document, name) for name in (*_TEXTS, *_NUMBERS)},
        "vector": vector,
        "body": base64.b64encode(document.body).decode() if _is_binary(document.body) else document.body.decode(),
        "binary": _is_binary(document.body),
    }


def _from_json(line: Any) -> Document:
    """Raises ValueError, TypeError or KeyError for anything that `_to_json` did not write."""
    if not isinstance(line, dict):
        raise TypeError("not an object")
    key, scope = bytes.fromhex(line["key"]), bytes.fromhex(line["scope"])
    if len(key) != 16 or len(scope) not in (0, 16):
        raise ValueError("key and scope have 16 bytes each")
    texts = {name: _text(line, name) for name in (*_TEXTS, "body")}
    numbers = {name: float(line[name]) for name in _NUMBERS}
    if not all(np.isfinite(number) for number in numbers.values()):
        raise ValueError("a time or the cost is not finite")
    raw = texts.pop("body")
    body = base64.b64decode(raw, validate=True) if line.get("binary") else raw.encode()
    return Document(
        key=key,
        scope=scope,
        namespace=texts["namespace"],
        category=texts["category"],
        model=texts["model"],
        endpoint=texts["endpoint"],
        upstream=texts["upstream"],
        text=texts["text"],
        body=body,
        created=numbers["created"],
        expires=numbers["expires"],
        cost=numbers["cost"],
        vector=_vector(line["vector"]),
    )


def _text(line: dict[str, Any], name: str) -> str:
    if not isinstance(line[name], str):
        raise TypeError(f"{name} is not a string")
    return str(line[name])


def _vector(encoded: Any) -> Vector | None:
    if encoded is None:
        return None
    try:
        vector = np.frombuffer(base64.b64decode(encoded, validate=True), np.float32)
    except binascii.Error as error:
        raise ValueError(f"vector: {error}") from error
    if not len(vector) or abs(float(vector @ vector) - 1.0) > 1e-2:
        raise ValueError("the vector is not of unit length")
    return vector


def _is_binary(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return True
    return False
