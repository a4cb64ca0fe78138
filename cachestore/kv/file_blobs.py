"""Blobs as files of one folder, which may be full, broken, slow or gone: what cannot be done is answered with False."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

UNFINISHED = ".tmp"
"""Ends the name of what is being written; a killed process leaves it."""

_QUIET = 60.0
"""Seconds between two lines about what failed."""

_log = logging.getLogger("hitpath.kv")


class FileBlobs:
    """get, set and delete. Any thread may call; each call lasts as long as the file system takes for it."""

    def __init__(self, directory: Path) -> None:
        """The directory must exist."""
        self._directory = directory
        self._told: float | None = None
        """When it was last said that something failed: a tier that fails does so for every chunk."""
        self._unsaid = 0

    def get(self, name: str, target: memoryview) -> bool:
        """Fill `target`; False if there is no such file or it has another size."""
        try:
            with (self._directory / name).open("rb", buffering=0) as file:
                target, at = target.cast("B"), 0
                while count := file.readinto(target[at:]):
                    at += count
                return at == len(target) and not file.read(1)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._tell(error)
            return False

    def set(self, name: str, data: memoryview) -> bool:
        """Write a file, which appears whole or not at all."""
        path = self._directory / name
        unfinished = path.with_suffix(UNFINISHED)
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError as error:
            self._tell(error)
            with suppress(OSError):
                unfinished.unlink()
            return False
        return True

    def delete(self, names: Sequence[str]) -> bool:
        """Remove these where they are."""
        done = True
        for name in names:
            try:
                (self._directory / name).unlink(missing_ok=True)
            except OSError as error:
                self._tell(error)
                done = False
        return done

    def close(self) -> None:
        """Nothing is open."""

    def _tell(self, error: OSError) -> None:
        now = time.monotonic()
        if self._told is not None and now - self._told < _QUIET:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last such line)" if self._unsaid else ""
        self._told, self._unsaid = now, 0
        _log.warning("a file of the disk tier cannot be used, its chunk counts as gone: %s%s", error, more)
