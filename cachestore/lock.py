"""One writer per data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from cachestore.errors import StoreError, StoreLocked


class DirectoryLock:
    """An exclusive lock on a data directory, given back by `release` or by the process's end, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises StoreLocked, which names the process that holds it, or StoreError."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"the data directory {directory} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise StoreLocked(
                f"{directory} is in use by process {holder}: stop it first, or ask the running gateway (--url) instead"
            ) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others in. The file stays: removing it would let two processes lock two files of one name."""
        os.ftruncate(self._file, 0)
        os.close(self._file)
