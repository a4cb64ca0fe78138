"""Runs the gateway: binds first, opens everything, says that it is ready, ends cleanly."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop
from starlette.applications import Starlette

from gateway.app import open_gateway
from gateway.errors import CannotListenError
from gateway.settings import Server, Settings

_BACKLOG = 2048
_GRACE = 10
"""Seconds that running requests get when the gateway is told to end."""

_KEEP_ALIVE = 75
"""Seconds an idle connection is kept: longer than clients and proxies do, so that none asks while we hang up."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises what open_gateway raises, and CannotListenError."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    listener = _bind(settings.server)
    async with open_gateway(settings) as gateway:
        config = server_config(gateway.app)
        ready = f"hitpath ready {_address(settings.server, listener)} models={','.join(gateway.models)}"
        # What was made at start stays: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        await _ReadyServer(config, ready).serve(sockets=[listener])


def server_config(app: Starlette) -> uvicorn.Config:
    """Return how uvicorn serves a gateway: no header of its own, no log of every request."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )


class _ReadyServer(uvicorn.Server):
    """A server that says when it listens, and leaves the closing of what lies behind it to the caller."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._ready, flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike the original do not raise the signal again afterwards: it would kill the process before it closed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def _bind(server: Server) -> socket.socket:
    try:
        if server.uds is not None:
            return _bind_uds(server.uds)
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        # With its protocol named, or asyncio's own loop would leave Nagle's algorithm on: 40 ms more an answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((server.host, server.port))
    except OSError as error:
        where = server.uds or f"{server.host}:{server.port}"
        raise CannotListenError(f"cannot listen on {where}: {error.strerror or error}") from error
    listener.set_inheritable(False)
    return listener


def _bind_uds(path: Path) -> socket.socket:
    """Bind a socket file, replacing one that nobody listens on any more."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError("another process listens there")
        path.unlink()
    listener.bind(str(path))
    return listener


def _address(server: Server, listener: socket.socket) -> str:
    if server.uds is not None:
        return f"unix:{server.uds}"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http://{host}:{listener.getsockname()[1]}"


def configure_logging() -> None:
    """Send warnings and what the operator should know to standard error, one line each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
