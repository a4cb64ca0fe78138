"""One engine process for all tests that speak HTTP to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests compute on tiny tensors; a second thread only waits for cores that other tests' processes have."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Served:
    """A running engine."""

    process: subprocess.Popen[str]
    url: str
    ready: str


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """Start `python -m engine`, wait for its ready line, and end it afterwards."""
    command = [sys.executable, "-m", "engine", "--threads", "1", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("hitpath engine ready "), f"the engine did not start: {ready!r}"
            yield Served(process, ready.split()[3], ready)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """The bundled model behind a port of its own."""
    with serving("--model", "bundled", "--port", "0", "--max-running", "4", "--max-waiting", "8") as running:
        yield running
