"""Chunk reuse over real sockets: the engine's process, its files, its death and its restart."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.checkpoint import load_checkpoint
from engine.settings import parse
from tests.engine import checkpoints
from tests.engine.conftest import Served, serving
from tests.engine.library import point_for

pytest.importorskip("lmcache", reason="LMCache is not installed: pip install 'hitpath[tiers]'")

ONE = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
TWO = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I sailed."
THREE = "All happy families are alike; every unhappy family is unhappy in its own way. Everything was in confusion."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "tiny"
    checkpoints.write(directory, max_position_embeddings=4096)
    checkpoint = load_checkpoint(directory, name="tiny")
    point_for(checkpoint, selector="full").save(directory.parent / "full.json")
    point_for(checkpoint).save(directory / "reuse.json")
    return directory


def body(*parts: str, question: str = "What then?", **settings: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": text} for text in (*parts, question)]
    fixed = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return {**fixed, "messages": [{"role": "user", "content": content}], **settings}


class Client:
    """One connection to an engine; what came back, and what the header said."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._session = aiohttp.ClientSession()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, payload: dict[str, Any], path: str = "chat/completions", **headers: str) -> tuple[Any, str]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(f"{self._served.url}/v1/{path}", json=payload, headers=sent) as response:
            assert response.status == 200, await response.text()
            header = response.headers["x-hitpath-kv"]
            return (await response.text() if payload.get("stream") else await response.json()), header

    async def figures(self) -> dict[str, float]:
        async with self._session.get(f"{self._served.url}/metrics") as response:
            lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async def stored(self, count: int) -> None:
        """Wait until so many chunks are where they stay."""
        until = time.monotonic() + 30
        while True:
            now = await self.figures()
            quiet = not now["hitpath_engine_reuse_background_jobs"] and not now["hitpath_engine_kv_writing_bytes"]
            if quiet and now["hitpath_engine_kv_chunks"] == count:
                return
            told = {name: value for name, value in now.items() if value and ("_kv_" in name or "reuse" in name)}
            assert time.monotonic() < until, (count, told)
            await asyncio.sleep(0.05)


def said(header: str) -> dict[str, str]:
    return dict(part.split("=") for part in header.split("; "))


def text(answer: Any) -> str:
    content: str = answer["choices"][0]["message"]["content"]
    return content


def files(directory: Path, part: str) -> list[Path]:
    return [path for path in sorted(directory.glob("*/*.data")) if path.name.split("@")[2] == part]


async def test_reuse_through_restarts_and_damage(model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "kv"
    start = ["--model", str(model), "--port", "0", "--kv-disk", str(disk), "--kv-disk-size", "64MiB"]
    with serving(*start) as first:
        assert "reuse=epic@0.15 kv_tiers=pool,memory,disk" in first.ready
        async with Client(first) as client:
            _, header = await client.ask(body(ONE, TWO))
            assert said(header) == {"prefix": "0", "chunks": "0", "recomputed": "0", "tier": "none"}
            answer, header = await client.ask(body(TWO, ONE))
            assert (said(header)["chunks"], said(header)["tier"]) == ("2", "pool")
            usage = answer["usage"]
            reused = len(ONE) + len(TWO) - int(said(header)["recomputed"])
            assert usage["prompt_tokens_details"]["cached_tokens"] == int(said(header)["prefix"]) + reused
            assert len(text(answer)) > 0
            streamed, header = await client.ask(body(TWO, ONE, question="And?", stream=True))
            assert int(said(header)["prefix"]) > 0
            assert streamed.endswith("data: [DONE]\n\n")
            await client.stored(2)
        first.process.kill()
    with serving(*start) as second:
        async with Client(second) as client:
            _, header = await client.ask(body(ONE, question="x"), x_hitpath_tenant="other")
            assert said(header)["chunks"] == "0"
            _, header = await client.ask(body(TWO, ONE))
            assert (said(header)["chunks"], said(header)["tier"]) == ("2", "disk")
            figures = await client.figures()
            assert figures['hitpath_engine_kv_hits_total{tier="disk"}'] == 2
            await client.stored(3)
        second.process.kill()
    for path in files(disk, "1"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data)
    with serving(*start) as third:
        async with Client(third) as client:
            _, header = await client.ask(body(TWO, ONE))
            assert said(header)["chunks"] == "0"
            assert (await client.figures())['hitpath_engine_kv_lost_total{reason="damaged"}'] >= 1
            while disk.exists():  # something may be written meanwhile
                shutil.rmtree(disk, ignore_errors=True)
            for parts in ((ONE, TWO), (THREE, ONE), (TWO, THREE)):
                answer, _ = await client.ask(body(*parts))
                assert len(text(answer)) > 0


async def test_cachecraft_through_a_restart(model: Path, tmp_path: Path) -> None:
    """Two contexts of a text are two versions of it, and where one of them is again nothing is computed of it."""
    point = point_for(load_checkpoint(model, name="tiny"), selector="cachecraft", ratio=0.5)
    point.save(tmp_path / "craft.json")
    disk = tmp_path / "kv"
    start = ["--model", str(model), "--port", "0", "--reuse-point", str(tmp_path / "craft.json")]
    start += ["--kv-disk", str(disk), "--kv-disk-size", "64MiB"]
    with serving(*start) as first:
        assert "reuse=cachecraft@0.5 " in first.ready
        async with Client(first) as client:
            await client.ask(body(ONE, TWO))
            await client.stored(2)
            _, header = await client.ask(body(THREE, TWO))
            assert said(header)["chunks"] == "1"
            assert 0 < int(said(header)["recomputed"]) < len(TWO)
            await client.stored(4)
        first.process.kill()
    for parts in ((ONE, TWO), (THREE, TWO)):
        with serving(*start) as served:
            async with Client(served) as client:
                reused, header = await client.ask(body(*parts, logprobs=True, top_logprobs=5))
                assert said(header) == {"prefix": "0", "chunks": "2", "recomputed": "0", "tier": "disk"}
                exact, header = await client.ask(body(*parts, logprobs=True, top_logprobs=5), x_hitpath_kv="exact")
                assert said(header)["chunks"] == "0"
                assert text(reused) == text(exact)
                for ours, theirs in zip(scores(reused), scores(exact), strict=True):
                    assert ours == pytest.approx(theirs, abs=1e-3)
                await client.stored(4)


async def test_kvshare_repairs_beside_the_tokens_drawn(model: Path, tmp_path: Path) -> None:
    point = point_for(load_checkpoint(model, name="tiny"), selector="kvshare", ratio=0.1, repair=4)
    point.save(tmp_path / "kvshare.json")
    with serving("--model", str(model), "--port", "0", "--reuse-point", str(tmp_path / "kvshare.json")) as served:
        async with Client(served) as client:
            await client.ask(body(ONE, TWO))
            await client.stored(2)
            assert (await client.figures())["hitpath_engine_reuse_repaired_total"] == 0
            answer, header = await client.ask(body(TWO, ONE, max_tokens=11))
            assert said(header)["chunks"] == "2"
            assert answer["usage"]["completion_tokens"] == 11
            # The first is drawn from the prompt; what the last one's step would bring nobody draws from.
            assert (await client.figures())["hitpath_engine_reuse_repaired_total"] == 10 * 4


def scores(answer: Any) -> list[list[float]]:
    """Of every token, the log probabilities of the likeliest."""
    told = answer["choices"][0]["logprobs"]["content"]
    return [[one["logprob"] for one in token["top_logprobs"]] for token in told]


async def test_a_tenant_keeps_within_its_quota(model: Path) -> None:
    with serving("--model", str(model), "--port", "0", "--kv-quota", "120KiB") as served:
        async with Client(served) as client:
            await client.ask(body(ONE), x_hitpath_tenant="other")
            await client.stored(1)
            await client.ask(body(TWO, THREE))
            await client.stored(2)  # one of this tenant's two, and the other's
            assert (await client.figures())["hitpath_engine_kv_evicted_total"] >= 1


async def test_everything_computed_again_is_the_same_as_no_reuse(model: Path, tmp_path: Path) -> None:
    orders = [(ONE, TWO, THREE), (THREE, ONE, TWO), (TWO, ONE), (ONE, THREE)]
    answers = []
    for flags in (("--reuse-point", str(model.parent / "full.json"), "--kv-disk", str(tmp_path)), ("--reuse", "off")):
        with serving("--model", str(model), "--port", "0", *flags) as served:
            assert f"reuse={'full@0.15' if len(flags) == 4 else 'off'}" in served.ready
            async with Client(served) as client:
                answers.append([await client.ask(body(*order, max_tokens=16)) for order in orders])
    assert [text(answer) for answer, _ in answers[0]] == [text(answer) for answer, _ in answers[1]]
    assert [said(header)["chunks"] for _, header in answers[0]] == [
        "0",
        "3",
        "2",
        "1",
    ]
    assert {said(header)["chunks"] for _, header in answers[1]} == {"0"}


async def test_marks_and_controls(model: Path) -> None:
    flags = ("--chunk-tags", "doc", "--chunk-separators", r"\n---\n")
    with serving("--model", str(model), "--port", "0", *flags) as served:
        async with Client(served) as client:
            first = f"<doc id=1>{ONE}</doc>\n<doc id=2>{TWO}</doc> Which?"
            plain = {"model": "tiny", "max_tokens": 2, "temperature": 0}
            await client.ask({**plain, "prompt": first}, "completions")
            await client.stored(2)
            _, header = await client.ask({**plain, "prompt": f"{TWO}\n---\n{ONE}\n---\nWhich?"}, "completions")
            assert said(header)["chunks"] == "2"
            _, header = await client.ask({**plain, "prompt": f"{TWO}\n---\n{ONE}"}, "completions", x_hitpath_kv="exact")
            assert (said(header)["chunks"], said(header)["prefix"]) == ("0", "0")
            async with client._session.post(
                f"{served.url}/v1/completions", json={**plain, "prompt": "x"}, headers={"x-hitpath-kv": "never"}
            ) as response:
                assert response.status == 400
                error = (await response.json())["error"]
            assert error["param"] == "x-hitpath-kv"
            assert "'exact'" in error["message"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-disk-size", "1GiB"], "--kv-disk-size needs --kv-disk"),
        (["--reuse", "off", "--kv-disk", "x"], "--reuse off: --kv-disk has no meaning"),
        (["--kv-redis", "localhost"], "redis://host:6379/0"),
        (["--chunk-tags", "a b"], "'a b' is not the name of a tag"),
        (["--chunk-separators", ",a"], "empty separator"),
    ],
)
def test_flags_that_make_no_sense_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "x", *flags])
    assert message in capsys.readouterr().err


def test_separators_may_have_commas_and_line_ends() -> None:
    parsed = parse(["--model", "x", "--chunk-separators", r"\n---\n, # # ,a\,b", "--chunk-tags", "doc,item"])
    assert parsed.reuse.separators == ("\n---\n", " # # ", "a,b")
    assert parsed.reuse.tags == ("doc", "item")


def refused(arguments: Sequence[str]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "engine", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_what_cannot_be_followed_is_named(model: Path, tmp_path: Path) -> None:
    start = ["--model", str(model), "--port", "0"]
    other = asdict(point_for(load_checkpoint(model, name="x"), model="another"))
    (tmp_path / "other.json").write_text(json.dumps({"version": 1, **other}))
    code, message = refused([*start, "--reuse-point", str(tmp_path / "other.json")])
    assert code == 2
    assert "other.json: model: measured for another" in message
    (tmp_path / "file").touch()
    code, message = refused([*start, "--kv-disk", str(tmp_path / "file")])
    assert code == 2
    assert f"--kv-disk {tmp_path / 'file'}" in message
