"""The bundled engine as a child: started before the gateway, started again when it dies, ended with it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from gateway.settings import SettingsError

log = logging.getLogger(__name__)

_READY = "hitpath engine ready"
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_STEADY = 60.0
"""Seconds after which a run counts as healthy, so that the next death starts with the shortest pause again."""
_GRACE = 10.0


class EngineFailedError(Exception):
    """The engine ended before it was ready; the message has its last words."""


class Engine:
    """Supervises one `hitpath engine` on a UNIX socket."""

    def __init__(
        self, name: str, model: str, command: Sequence[str] | None = None, *, flags: Sequence[str] = ()
    ) -> None:
        """`model` is a checkpoint's folder or `bundled`; `command` replaces the program, for tests."""
        self.name = name
        self._directory = tempfile.TemporaryDirectory(prefix="hitpath-")
        self.uds = Path(self._directory.name) / "engine.sock"
        own = ["--uds", str(self.uds), "--parent-pid", str(os.getpid())]
        self._command = [*(command or engine_command(model)), *flags, *own]
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.ready = False

    @property
    def pid(self) -> int:
        """The running engine's process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start the engine and return when it listens. Raises EngineFailedError."""
        await self._run()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the engine: politely, then not."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _GRACE)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._directory.cleanup()

    async def _run(self) -> None:
        self.uds.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=asyncio.subprocess.PIPE)
        stdout = self._process.stdout
        assert stdout is not None
        while line := await stdout.readline():
            if line.decode(errors="replace").startswith(_READY):
                self.ready = True
                return
        status = await self._process.wait()
        raise EngineFailedError(f"the bundled engine of upstream {self.name} ended with status {status}")

    async def _ended(self) -> int:
        """Wait for the end, reading on so that a talkative engine never blocks on a full pipe."""
        assert self._process is not None
        assert self._process.stdout is not None
        while await self._process.stdout.read(2**16):
            pass
        return await self._process.wait()

    async def _keep(self) -> None:
        """Wait for the engine's death and start it again, less and less eagerly."""
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            status = await self._ended()
            self.ready = False
            if time.monotonic() - started > _STEADY:
                pause = _FIRST_PAUSE
            log.error("the engine of upstream %s ended with status %s; next start in %.1f s", self.name, status, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
            with suppress(EngineFailedError):
                await self._run()


def engine_command(model: str) -> list[str]:
    """Return the program that runs the engine. Raises SettingsError when the engine is not installed."""
    if find_spec("engine") is None or find_spec("torch") is None:
        raise SettingsError(
            "the bundled engine is not installed (pip install 'hitpath[engine]'); "
            "or name a backend: --upstream http://HOST:PORT/v1"
        )
    return [sys.executable, "-P", "-m", "engine", "--model", model]
