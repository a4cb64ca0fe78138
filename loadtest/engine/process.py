"""An engine process under test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from loadtest.bench_client import BenchError


@dataclass(frozen=True, slots=True)
class Served:
    """A running engine."""

    process: subprocess.Popen[str]
    url: str
    """`http://HOST:PORT`."""

    def resident(self) -> int:
        """Bytes of memory that are in use and in RAM."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """Start `hitpath engine` on a free port, and end it afterwards. Raises BenchError when it does not start."""
    # -P: the working directory's folders do not take the place of installed packages.
    command = [sys.executable, "-P", "-m", "engine", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            if not ready.startswith("hitpath engine ready "):
                raise BenchError(f"the engine did not start: {ready!r}")
            yield Served(process, ready.split()[3])
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
