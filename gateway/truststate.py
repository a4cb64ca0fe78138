"""What has been learnt, in a file of the data directory: written whole or not at all, in a thread."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from gateway.trust import Trust

log = logging.getLogger(__name__)

NAME = "trust.json"
_EVERY = 2.0
"""Seconds between two looks whether there is anything to write: what a `kill -9` may cost."""


class TrustFile:
    """Keeps a Trust on disk; make it with `open`."""

    def __init__(self, path: Path, trust: Trust) -> None:
        self._path = path
        self._trust = trust
        self._written = trust.changed
        self._turn = asyncio.Lock()
        self._failing = False
        self._task = asyncio.create_task(self._keep())

    @classmethod
    async def open(cls, directory: Path, trust: Trust) -> TrustFile:
        """Take up what the file has; a damaged one is reported, moved aside, and everything begins anew."""
        path = directory / NAME
        try:
            plain = await asyncio.to_thread(read, path)
            if plain is not None:
                trust.restore(plain)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            aside = path.with_name(f"{NAME}.damaged")
            log.warning("%s cannot be used: %s; error budgets begin anew, the file is now %s", path, error, aside)
            with suppress(OSError):
                path.replace(aside)
        return cls(path, trust)

    async def flush(self) -> None:
        """Write what has changed; returns when it is durable. A disk that refuses is reported, and tried again."""
        async with self._turn:
            changed = self._trust.changed
            if changed == self._written:
                return
            plain = orjson.dumps(self._trust.plain())
            try:
                await asyncio.to_thread(_write, self._path, plain)
            except OSError as error:
                if not self._failing:
                    log.error(
                        "%s cannot be written: %s; error budgets go on, and are forgotten at a crash", self._path, error
                    )
                self._failing = True
                return
            self._failing = False
            self._written = changed

    async def close(self) -> None:
        """Write once more and end."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            await self.flush()


def read(path: Path) -> dict[str, Any] | None:
    """Return the state that a file has; None if there is no file. Raises ValueError when it is damaged, OSError."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if head != _sum(body):
        raise ValueError("its checksum does not fit")
    plain = orjson.loads(body)
    if not isinstance(plain, dict):
        raise ValueError("it is not a JSON object")
    return plain


def _write(path: Path, body: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(_sum(body) + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _sum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()
