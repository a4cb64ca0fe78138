"""The gateway as a process: ready line, exit codes, signals, `kill -9`, the engine that it supervises."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from gateway.supervise import Engine, EngineFailedError
from tests.fakes import Normal, ScriptedUpstream
from tests.gateway.harness import chat_body

COMMAND = [sys.executable, "-P", "-m", "gateway.cli"]


def config_file(directory: Path, upstream: ScriptedUpstream | None = None, **groups: Any) -> Path:
    document: dict[str, Any] = {"data_dir": str(directory / "data"), "cache": {"embedder": {"kind": "none"}}, **groups}
    if upstream is not None:
        document["upstreams"] = [{"name": "up", "kind": "openai", "url": upstream.url}]
    path = directory / "hitpath.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


async def start(*arguments: str, **environment: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdout=PIPE, stderr=PIPE, env={**os.environ, **environment}
    )


async def ready(process: Process) -> str:
    """Return the URL of the ready line."""
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert line.startswith("hitpath ready http://127.0.0.1:"), line
    return line.split()[2]


@asynccontextmanager
async def served(config: Path) -> AsyncIterator[tuple[Process, str]]:
    process = await start("serve", "--config", str(config), "--port", "0")
    try:
        yield process, await ready(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ask(session: aiohttp.ClientSession, url: str, text: str, **fields: Any) -> tuple[int, str, bytes]:
    async with session.post(f"{url}/v1/chat/completions", json=chat_body(text, **fields)) as response:
        return response.status, response.headers.get("cache-status", ""), await response.read()


async def test_ready_serving_and_a_clean_end(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    async with served(config_file(tmp_path, upstream)) as (process, url), aiohttp.ClientSession() as session:
        assert (await ask(session, url, "hello"))[0] == 200
        process.send_signal(signal.SIGTERM)
        stdout, stderr = await process.communicate()
        assert process.returncode == 0
        assert stdout == b""
        assert b"Traceback" not in stderr


async def test_sigterm_lets_running_requests_end(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    gate = asyncio.Event()
    upstream.script(Normal(gate=gate))
    async with served(config_file(tmp_path, upstream)) as (process, url), aiohttp.ClientSession() as session:
        asking = asyncio.create_task(ask(session, url, "hello", stream=True))
        await upstream.arrival()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        gate.set()
        assert (await asking)[2].endswith(b"data: [DONE]\n\n")
        await process.communicate()
        assert process.returncode == 0


async def test_what_a_client_has_seen_survives_kill_9(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    config = config_file(tmp_path, upstream)
    seen: dict[str, bytes] = {}

    async def ask_on(session: aiohttp.ClientSession, url: str, lane: int) -> None:
        for number in range(10_000):
            text = f"question {lane} {number}"
            status, cache, body = await ask(session, url, text, stream=lane % 2 == 0)
            if status == 200 and "stored" in cache and (lane % 2 or body.endswith(b"[DONE]\n\n")):
                seen[text] = body

    for _ in range(2):
        async with served(config) as (process, url), aiohttp.ClientSession() as session:
            lanes = [asyncio.create_task(ask_on(session, url, lane)) for lane in range(8)]
            before = len(seen)
            while len(seen) < before + 150:
                await asyncio.sleep(0.005)
            process.kill()
            await asyncio.gather(*lanes, return_exceptions=True)
    async with served(config) as (_, url), aiohttp.ClientSession() as session:
        for text, body in seen.items():
            status, cache, again = await ask(session, url, text, stream=body.endswith(b"[DONE]\n\n"))
            assert status == 200
            assert "detail=exact" in cache, text
            assert len(again) > 100
    verify = await start("cache", "verify", "--data-dir", str(tmp_path / "data"))
    stdout, _ = await verify.communicate()
    assert (verify.returncode, stdout.decode().strip()) == (0, "all is well")


async def test_a_second_gateway_on_the_directory_is_refused(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    config = config_file(tmp_path, upstream)
    async with served(config) as (process, _):
        second = await start("serve", "--config", str(config), "--port", "0")
        _, stderr = await second.communicate()
        assert second.returncode == 1
        assert str(process.pid) in stderr.decode()
        purge = await start("cache", "purge", "--all", "--data-dir", str(tmp_path / "data"))
        _, stderr = await purge.communicate()
        assert purge.returncode == 1
        assert "--url" in stderr.decode()


async def test_a_port_in_use(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await start("serve", "--config", str(config_file(tmp_path, upstream)), "--port", str(port))
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in stderr.decode()
    assert "Traceback" not in stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "--config", "missing.yaml"], 2, "missing.yaml: cannot be read"),
        (["serve", "--upstream", "nonsense"], 2, "--upstream: 'nonsense' is not a URL"),
        (["serve", "--port", "99999"], 2, "server.port"),
        (["serve", "--frobnicate"], 2, "--frobnicate"),
        (["frobnicate"], 2, "frobnicate"),
        ([], 2, "COMMAND"),
        (["cache", "purge"], 2, "--all"),
        (["cache", "stats", "--url", "http://127.0.0.1:1", "--admin-key", "k"], 1, "cannot be asked"),
        (["cache", "ls", "--data-dir", "/nonexistent"], 1, "/nonexistent"),
        (["--help"], 0, ""),
    ],
)
async def test_exit_codes(arguments: list[str], status: int, said: str, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=PIPE, stderr=PIPE, cwd=tmp_path)
    _, stderr = await process.communicate()
    assert process.returncode == status
    assert said in stderr.decode()
    assert "Traceback" not in stderr.decode()


async def test_a_unix_socket(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    config = config_file(tmp_path, upstream)
    for _ in range(2):  # the second start finds the socket file that the killed first one left
        process = await start("serve", "--config", str(config), "--uds", str(path))
        assert process.stdout is not None
        assert (await process.stdout.readline()).decode().startswith(f"hitpath ready unix:{path}")
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            assert (await ask(session, "http://gateway", "hello"))[0] == 200
        process.kill()
        await process.communicate()


FAKE_ENGINE = """
import os, socket, sys, time
path = sys.argv[sys.argv.index("--uds") + 1]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("starting", flush=True)
print("hitpath engine ready unix:" + path, os.getpid(), flush=True)
print("x" * 200_000, flush=True)
open(path + ".talked", "w").close()
time.sleep(600)
"""


async def test_the_engine_is_started_again_when_it_dies() -> None:
    engine = Engine("local", "bundled", [sys.executable, "-c", FAKE_ENGINE])
    await engine.start()
    try:
        talked = engine.uds.with_name(engine.uds.name + ".talked")
        while not talked.exists():  # a talkative engine is not blocked by a full pipe
            await asyncio.sleep(0.01)
        first = engine.pid
        os.kill(first, signal.SIGKILL)
        for state in (False, True):
            while engine.ready is not state:
                await asyncio.sleep(0.01)
        assert engine.pid != first
    finally:
        await engine.stop()
    assert not engine.uds.parent.exists()


async def test_the_engine_is_given_its_flags() -> None:
    program = FAKE_ENGINE.replace(
        "time.sleep(600)", "open(path + '.flags', 'w').write(' '.join(sys.argv)); time.sleep(600)"
    )
    engine = Engine("local", "bundled", [sys.executable, "-c", program], flags=("--kv-host", "2GiB"))
    await engine.start()
    try:
        told = engine.uds.with_name(engine.uds.name + ".flags")
        while not told.exists() or not told.read_text():
            await asyncio.sleep(0.01)
        assert "--kv-host 2GiB --uds" in told.read_text()
    finally:
        await engine.stop()


async def test_an_engine_that_cannot_start_says_so() -> None:
    engine = Engine("local", "bundled", [sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(EngineFailedError, match="local ended with status 3"):
        await engine.start()
    await engine.stop()
