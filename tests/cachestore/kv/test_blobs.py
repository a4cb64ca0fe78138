"""Blobs in files: they appear whole or not at all, and what cannot be done is answered with False."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cachestore.kv.file_blobs import FileBlobs


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path)


def read(blobs: FileBlobs, name: str, size: int) -> bytes | None:
    target = bytearray(size)
    return bytes(target) if blobs.get(name, memoryview(target)) else None


def test_what_was_written_is_read_and_replaced(blobs: FileBlobs, tmp_path: Path) -> None:
    assert blobs.set("a", memoryview(b"first"))
    assert read(blobs, "a", 5) == b"first"
    assert blobs.set("a", memoryview(b"other one"))
    assert read(blobs, "a", 9) == b"other one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert blobs.delete(["a", "never there"])
    assert read(blobs, "a", 9) is None


@pytest.mark.parametrize("size", [0, 4, 6])
def test_another_size_is_absent(blobs: FileBlobs, size: int) -> None:
    blobs.set("a", memoryview(b"fives"))
    assert read(blobs, "a", size) is None


def test_an_empty_one(blobs: FileBlobs) -> None:
    assert blobs.set("a", memoryview(b""))
    assert read(blobs, "a", 0) == b""


def test_failures_are_told_once_a_minute(
    blobs: FileBlobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("cachestore.kv.file_blobs.time.monotonic", lambda: now)
    caplog.set_level(logging.WARNING)
    (tmp_path / "b").mkdir()
    assert not blobs.set("b", memoryview(b"x"))
    assert blobs.set("a", memoryview(b"x"))
    assert read(blobs, "b", 1) is None
    assert not blobs.delete(["b"])
    assert len(caplog.records) == 1
    now = 61.0
    assert not blobs.set("b", memoryview(b"x"))
    assert [("2 more since" in record.getMessage()) for record in caplog.records] == [False, True]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]
