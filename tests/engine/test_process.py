"""How the engine's process starts and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import psutil

from tests.engine import checkpoints
from tests.engine.conftest import serving


async def test_it_ends_when_told_even_with_an_answer_under_way(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "tiny", max_position_embeddings=100_000)
    path = tmp_path / "engine.sock"
    with serving("--model", str(tmp_path / "tiny"), "--uds", str(path), "--grace", "1") as running:
        assert running.url == f"unix:{path}"
        body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 99_000, "ignore_eos": True}
        connector = aiohttp.UnixConnector(str(path))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post("http://engine/v1/completions", json=body) as response,
        ):
            assert (await response.content.readline()).startswith(b"data: ")
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0
    assert not path.exists()


def test_a_socket_left_by_a_crash_is_taken_over_and_one_in_use_is_not(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "tiny")
    path = tmp_path / "engine.sock"
    arguments = ["--model", str(tmp_path / "tiny"), "--uds", str(path)]
    with serving(*arguments) as first:
        command = [sys.executable, "-m", "engine", *arguments]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "in use" in refused.stderr
        first.process.kill()
    assert path.exists()
    with serving(*arguments) as second:
        assert second.url == f"unix:{path}"


def test_it_ends_with_the_process_that_supervises_it(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "tiny")
    path = tmp_path / "engine.sock"
    supervisor = (
        "import os, subprocess, sys\n"
        "engine = subprocess.Popen([sys.executable, '-m', 'engine', *sys.argv[1:], '--parent-pid', str(os.getpid())])\n"
        "print(engine.pid, flush=True)\n"
        "engine.wait()\n"
    )
    command = [sys.executable, "-c", supervisor, "--model", str(tmp_path / "tiny"), "--uds", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline().startswith("hitpath engine ready")
        os.kill(parent.pid, signal.SIGKILL)
    engine.wait(30)
    deadline = time.monotonic() + 5
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not path.exists()
