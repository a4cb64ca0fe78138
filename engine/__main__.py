"""`python -m engine`: load a checkpoint, listen, say so, serve until told to stop. With `calibrate`: see
`engine.calibration`.

Exit codes: 0 stopped as asked, 1 failed, 2 the command line or the checkpoint is wrong.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from engine.errors import CheckpointError, SettingsError
from engine.memory import share_freed
from engine.settings import CalibrationSettings, Settings, parse, parse_calibration
from engine.threads import before_torch

_KEEP_ALIVE = 75
"""Seconds an idle connection is kept: longer than clients and proxies do, so that none asks while we hang up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["calibrate"]:
        return _calibrate(parse_calibration(given[1:]))
    settings = parse(given)
    if not _torch_is_there():
        return 2
    share_freed()
    if settings.parent_pid is not None:
        threading.Thread(target=_follow, args=(settings.parent_pid, settings.grace), daemon=True).start()
    try:
        # Reserved before the slow part, listened on after it: a taken port is known at once.
        listener = bind(settings)
    except OSError as error:
        print(f"hitpath engine: cannot listen on {_place(settings)}: {error}", file=sys.stderr)
        return 1
    try:
        return _serve(settings, listener)
    except (CheckpointError, SettingsError) as error:
        print(f"hitpath engine: {error}", file=sys.stderr)
        return 2
    finally:
        listener.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


def _calibrate(settings: CalibrationSettings) -> int:
    if not _torch_is_there():
        return 2
    before_torch()
    from engine.calibration import calibrate

    return calibrate(settings)


def _torch_is_there() -> bool:
    if find_spec("torch") is None:
        print("hitpath engine: torch is not installed (pip install 'hitpath[engine]')", file=sys.stderr)
        return False
    return True


def bind(settings: Settings) -> socket.socket:
    """A socket with its address, not listening yet. Raises OSError."""
    if settings.uds is None:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address: str | tuple[str, int] = (settings.host, settings.port)
    else:
        listener, address = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), settings.uds
        _remove_stale(Path(settings.uds))
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """A socket file that nobody answers on is left over from a crash. Raises OSError when somebody does."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise OSError(f"{path} is in use")


def _serve(settings: Settings, listener: socket.socket) -> int:
    before_torch()
    # Torch takes seconds to import: a wrong command line should not wait for it.
    import uvicorn

    from engine.assembly import assemble

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"hitpath engine ready {_place(settings, listener)} {assembled.describe()}", flush=True)

    assembled = assemble(settings)
    config = uvicorn.Config(
        assembled.application,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=settings.grace,
    )
    # Uvicorn raises the signal that stopped it once more after shutting down; being stopped is no failure here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # What was made at start stays: walking it takes the collector 150 ms, in which no token comes.
    gc.collect()
    gc.freeze()
    try:
        Server(config).run(sockets=[listener])
    finally:
        assembled.close()
    return 0


def _place(settings: Settings, listener: socket.socket | None = None) -> str:
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    port = settings.port if listener is None else listener.getsockname()[1]
    return f"http://[{settings.host}]:{port}" if ":" in settings.host else f"http://{settings.host}:{port}"


def _follow(parent: int, grace: int) -> None:
    """End this process when `parent` is gone; polling works on every system and through any launcher between."""
    was_parent = os.getppid() == parent
    while _alive(parent) and (not was_parent or os.getppid() == parent):
        time.sleep(0.25)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace + 5)
    os._exit(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
