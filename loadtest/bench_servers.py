"""The processes under test, each on a core of its own choosing: gateway, scripted backend, JSON echo.

`python -m loadtest.bench_servers --port N` is the echo: the least that a Starlette application can do with a JSON body,
served as the gateway is. It is the ceiling of exact hits.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gateway.server import server_config
from loadtest.bench_client import BenchError

_START = 60.0
"""Seconds for a server to listen; the first gateway also builds the embedder's file."""
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where."""

    server: int
    client: int

    @classmethod
    def choose(cls) -> Cores:
        """Give the server a core of its own where there are two; client and backend share the other."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[-1])


@dataclass(frozen=True, slots=True)
class Server:
    """A running server process."""

    process: subprocess.Popen[str]
    port: int

    def cpu_seconds(self) -> float:
        """Processor time it has used, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def resident(self) -> int:
        """Bytes of memory that are in use and in RAM."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def gateway(root: Path, core: int, backend: Server, cache: Mapping[str, Any]) -> Iterator[Server]:
    """A gateway with a fresh data directory below `root`; all of them share the embedder's file there."""
    data_dir = root / f"gateway-{time.monotonic_ns()}"
    data_dir.mkdir()
    (root / "cache").mkdir(exist_ok=True)
    (data_dir / "cache").symlink_to(root / "cache")
    upstream = {"name": "scripted", "kind": "openai", "url": f"http://127.0.0.1:{backend.port}/v1"}
    settings = {"server": {"port": 0}, "data_dir": str(data_dir), "upstreams": [upstream], "cache": cache}
    file = data_dir / "settings.yaml"
    file.write_text(json.dumps(settings))
    with _running(["gateway.cli", "serve", "--config", str(file)], core, stdout=subprocess.PIPE) as process:
        yield Server(process, _port_of(process))


@contextmanager
def scripted(core: int, *arguments: str) -> Iterator[Server]:
    """The scripted backend."""
    yield from _on_free_port("loadtest.scripted", core, arguments)


@contextmanager
def echo(core: int) -> Iterator[Server]:
    """The bare echo."""
    yield from _on_free_port("loadtest.bench_servers", core, ())


def _on_free_port(module: str, core: int, arguments: tuple[str, ...]) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with _running([module, "--port", str(port), *arguments], core) as process:
        _wait_for(process, port)
        yield Server(process, port)


@contextmanager
def _running(module: list[str], core: int, stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    # -P: the working directory's folders do not take the place of installed packages.
    command = [sys.executable, "-P", "-m", *module]
    process = subprocess.Popen(command, stdout=stdout, text=True)
    try:
        # At once, while it has one thread: those that follow inherit it.
        os.sched_setaffinity(process.pid, {core})
        yield process
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def _port_of(process: subprocess.Popen[str]) -> int:
    """Read the gateway's ready line."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], _START)[0]:
        raise BenchError(f"the gateway was not ready within {_START:g} s")
    line = process.stdout.readline()
    if not line.startswith("hitpath ready "):
        raise BenchError(f"the gateway did not start: {line.strip() or 'it said nothing'}")
    return int(line.split()[2].rpartition(":")[2])


def _wait_for(process: subprocess.Popen[str], port: int) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise BenchError(f"{process.args!r} does not listen")


async def _echo(request: Request) -> JSONResponse:
    return JSONResponse(await request.json())


def main() -> None:
    """Serve the echo until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    app = Starlette(routes=[Route("/{path:path}", _echo, methods=["POST"])])
    config = server_config(app)
    uvicorn.Server(config).run(sockets=[socket.create_server(("127.0.0.1", port), backlog=2048)])


if __name__ == "__main__":
    main()
