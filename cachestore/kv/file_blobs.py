"""Blobs as files of one folder, which may be full, broken, slow or gone: what cannot be done is answered with False."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

UNFINISHED = ".tmp"
"""Ends the name of what is being written; a killed process leaves it."""

_log = logging.getLogger("hitpath.kv")


class FileBlobs:
    """get, set and delete. Any thread may call; each call lasts as long as the file system takes for it."""

    def __init__(self, directory: Path) -> None:
        """The directory must exist."""
        self._directory = directory
        self._told = False
        """That something failed is said once, until something is written again."""

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
        self._told = False
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
        if not self._told:
            self._told = True
            _log.warning("a file of the disk tier cannot be used, its chunk counts as gone: %s", error)
