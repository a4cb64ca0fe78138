"""`python -m engine`: load a checkpoint, listen, say so, serve until told to stop.

Exit codes: 0 stopped as asked, 1 failed, 2 the command line or the checkpoint is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.errors import CheckpointError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line, checked."""

    model: str
    served_name: str
    host: str
    port: int
    uds: str | None
    device: str
    dtype: str
    kv_memory: int
    threads: int
    max_running: int
    max_waiting: int
    grace: int
    parent_pid: int | None


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="hitpath engine", description="The bundled OpenAI-compatible engine.")
    parser.add_argument("--model", required=True, help="directory in the Hugging Face layout, or `bundled`")
    parser.add_argument("--served-name", help="model name clients use (default: the directory's name)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--port", type=_port, default=8081, help="0 takes a free one (default: 8081)")
    where.add_argument("--uds", help="path of a UNIX socket to listen on instead")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--kv-memory", type=size, default="1GiB", help="bytes for keys and values (default: 1GiB)")
    parser.add_argument("--threads", type=_positive, default=None, help="default: the cores this process may use")
    parser.add_argument("--max-running", type=_positive, default=4, help="answers generated in turn (default: 4)")
    parser.add_argument("--max-waiting", type=_positive, default=256, help="answers that may wait (default: 256)")
    parser.add_argument("--grace", type=_positive, default=10, help="seconds to finish answers when stopped")
    parser.add_argument("--parent-pid", type=_positive, help="stop when this process is gone")
    args = parser.parse_args(arguments)
    return Settings(
        model=args.model,
        served_name=args.served_name or Path(args.model).resolve().name,
        host=args.host,
        port=args.port,
        uds=args.uds,
        device=args.device,
        dtype=args.dtype,
        kv_memory=args.kv_memory,
        threads=args.threads or usable_cores(),
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        grace=args.grace,
        parent_pid=args.parent_pid,
    )


def size(text: str) -> int:
    """Bytes of `512MiB`, `2GB` or a bare number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512MiB, 2GB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def usable_cores() -> int:
    """Cores that affinity and the container's CPU limit leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number: no limit
    return cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine; returns the exit code."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    if find_spec("torch") is None:
        print("hitpath engine: torch is not installed (pip install 'hitpath[engine]')", file=sys.stderr)
        return 2
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
    except CheckpointError as error:
        print(f"hitpath engine: {error}", file=sys.stderr)
        return 2
    finally:
        listener.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


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
    # Torch takes seconds to import: a wrong command line should not wait for it.
    import torch
    import uvicorn

    from engine.checkpoint import BUNDLED, load_checkpoint
    from engine.runner import Runner
    from engine.server import Engine, room

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(ready, flush=True)

    torch.set_num_threads(settings.threads)
    directory = BUNDLED if settings.model == "bundled" else Path(settings.model)
    device = _device(settings.device, cuda=torch.cuda.is_available())
    checkpoint = load_checkpoint(directory, name=settings.served_name, device=device, dtype=settings.dtype)
    kv_tokens = room(checkpoint, settings.kv_memory)
    context = min(checkpoint.config.max_positions, kv_tokens)
    if context < 2:
        raise CheckpointError(f"--kv-memory: {settings.kv_memory} bytes do not hold two tokens of this model")
    runner = Runner(
        checkpoint,
        kv_tokens=kv_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        threads=settings.threads,
    )
    ready = (
        f"hitpath engine ready {_place(settings, listener)} model={checkpoint.name} device={device} "
        f"dtype={str(checkpoint.dtype).removeprefix('torch.')} context={context} threads={settings.threads}"
    )
    config = uvicorn.Config(
        Engine(checkpoint, runner, context=context).application(),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=settings.grace,
    )
    # Uvicorn raises the signal that stopped it once more after shutting down; being stopped is no failure here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[listener])
    return 0


def _device(asked: str, *, cuda: bool) -> str:
    if asked == "cuda" and not cuda:
        raise CheckpointError("--device cuda: no CUDA device is usable here")
    return ("cuda" if cuda else "cpu") if asked == "auto" else asked


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


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
