"""Where the measurement data lies, and how its files are read: JSON lines, gzipped or not."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson


class DataError(Exception):
    """A data file is absent or not what it should be; the message names file and line."""


def data_dir() -> Path:
    """The folder named by `HITPATH_DATA`, else `../shared/data` beside the repository. Raises DataError when absent."""
    path = Path(os.environ.get("HITPATH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not path.is_dir():
        raise DataError(f"{path}: no measurement data here; set HITPATH_DATA to its folder")
    return path


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one object a line, blank lines skipped. Raises DataError."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(path, number, line)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from error


def text_field(path: Path, number: int, row: dict[str, Any], name: str) -> str:
    """A field that must be a string. Raises DataError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{path}: row {number}: {name!r} must be a string")
    return value


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: line {number}: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number}: not an object")
    return row
