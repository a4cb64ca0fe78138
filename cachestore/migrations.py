"""The log's format: numbered steps, each from one version to the next. Steps are never edited, only added."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from cachestore.errors import NewerLog, NotOurLog

APPLICATION_ID = 0x48495450
"""`HITP`, in the database's header."""

# Metadata and payload are apart so that a scan over the entries does not read their bodies. Ids are never given twice
# (AUTOINCREMENT): an id that a search returned must not name another answer by the time it is fetched.
STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE entry (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            key BLOB NOT NULL UNIQUE,
            scope BLOB NOT NULL,
            namespace TEXT NOT NULL,
            category TEXT NOT NULL,
            model TEXT NOT NULL,
            endpoint TEXT NOT NULL,
            upstream TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL NOT NULL,
            cost REAL NOT NULL,
            size INTEGER NOT NULL,
            hits INTEGER NOT NULL DEFAULT 0,
            used REAL NOT NULL
        )""",
        """CREATE TABLE payload (
            id INTEGER PRIMARY KEY,
            vector BLOB,
            vector_sum INTEGER NOT NULL,
            packed INTEGER NOT NULL,
            answer_sum INTEGER NOT NULL,
            text TEXT NOT NULL,
            body BLOB NOT NULL
        )""",
    ),
)
VERSION = len(STEPS)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a log to this version. Raises NotOurLog, NewerLog; each step is one transaction."""
    version = check_format(connection, path)
    for number, statements in enumerate(STEPS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise


def check_format(connection: sqlite3.Connection, path: Path) -> int:
    """The log's version, 0 for an empty file. Raises NotOurLog, NewerLog."""
    application = _pragma(connection, "application_id")
    version = _pragma(connection, "user_version")
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not tables and not application:
        return 0
    if application != APPLICATION_ID:
        raise NotOurLog(f"{path} is a database of another program (application id {application:#x}): move it away")
    if version > VERSION:
        raise NewerLog(
            f"{path} has format {version}, this Hitpath reads up to {VERSION}: use the newer one that wrote it"
        )
    return version


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
