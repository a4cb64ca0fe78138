import asyncio
import gzip
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from loadtest.data import DataError
from loadtest.replay import Request as Asked
from loadtest.replay import arrivals, main, outcome_of, read_trace

USAGE = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}


class Gateway:
    """Answers with a hit what it was asked before; texts named after a fault get that fault."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.authorization: str | None = None

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "toy-1"}]})

    async def chat(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.bodies.append(body)
        self.authorization = request.headers.get("authorization")
        text = body["messages"][0]["content"]
        if text == "refused":
            return JSONResponse({"error": {"message": "no"}}, 503)
        headers = {"cache-status": self._status(text)}
        self.seen.add(text)
        if body.get("stream"):
            return StreamingResponse(self._events(text), headers=headers, media_type="text/event-stream")
        if text == "garbage":
            return Response("<html>", headers=headers)
        return JSONResponse({"choices": [], "usage": USAGE}, headers=headers)

    def _status(self, text: str) -> str:
        if text == "alike":
            return "hitpath; hit; ttl=3; detail=semantic"
        if text == "twin":
            return "hitpath; fwd=miss; fwd-status=200; collapsed"
        return "hitpath; hit; ttl=9; detail=exact" if text in self.seen else "hitpath; fwd=miss; fwd-status=200; stored"

    async def _events(self, text: str) -> AsyncIterator[bytes]:
        yield b'data: {"choices": [{"delta": {"content": "say \\"usage\\""}}]}\n\nda'
        if text == "error in stream":
            yield b'ta: {"error": {"message": "died"}}\n\n'
            return
        yield b"ta: " + orjson.dumps({"choices": [], "usage": USAGE}) + b"\n\n"
        if text != "cut":
            yield b"data: [DONE]\n\n"


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def url(gateway: Gateway) -> Iterator[str]:
    """The gateway on a real socket, in a thread of its own: the command under test runs its own event loop."""
    app = Starlette(
        routes=[Route("/v1/models", gateway.models), Route("/v1/chat/completions", gateway.chat, methods=["POST"])]
    )
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def trace(tmp_path: Path, *texts: str) -> str:
    path = tmp_path / "trace.jsonl.gz"
    rows = (orjson.dumps({"timestamp_ms": 10 * number, "prompt": text}) for number, text in enumerate(texts))
    path.write_bytes(gzip.compress(b"\n".join(rows)))
    return str(path)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_the_second_pass_is_all_hits(
    gateway: Gateway, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: str
) -> None:
    file = trace(tmp_path, "one", "two", "three", "alike", "twin")
    arguments = [file, "--url", url, "--passes", "2", "--json", "--api-key", "k", "--max-tokens", "9", stream]
    assert main([*arguments, "--concurrency", "1"]) == 0
    summary = orjson.loads(capsys.readouterr().out)
    assert summary["model"] == "toy-1"
    first, second = summary["passes"]
    assert (first["requests"], first["failures"], first["misses"]) == (5, 0, 3)
    assert first["hits"] == {"exact": 0, "semantic": 1, "collapsed": 1}
    assert first["miss_reasons"] == {"miss": 3}
    assert first["tokens_saved"] == 14
    assert (second["misses"], second["hit_rate"]) == (0, 0.8)
    assert second["hits"] == {"exact": 3, "semantic": 1, "collapsed": 1}
    assert second["latency_ms"]["misses"]["total"] is None
    assert second["tokens_saved"] == 35
    assert second["seconds_saved"] > 0
    assert gateway.authorization == "Bearer k"
    assert all(body["max_tokens"] == 9 and body["model"] == "toy-1" for body in gateway.bodies)


def test_failures_are_counted_and_told(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trace(tmp_path, "fine", "refused", "error in stream", "cut")
    assert main([file, "--url", f"{url}/v1/", "--json"]) == 1
    (result,) = orjson.loads(capsys.readouterr().out)["passes"]
    assert (result["requests"], result["failures"], result["misses"]) == (4, 3, 1)
    told = " ".join(result["failure_reasons"])
    assert all(part in told for part in ("status 503", "died", "without [DONE]"))
    assert main([trace(tmp_path, "garbage"), "--url", url, "--no-stream", "--json"]) == 1
    assert "not JSON" in capsys.readouterr().out


def test_the_table_is_for_people(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace(tmp_path, "one", "one", "two"), "--url", url, "--limit", "2", "--concurrency", "1"]) == 0
    output = capsys.readouterr().out
    assert "pass 1: 2 requests" in output
    assert "hits       1 exact, 0 semantic; 0 collapsed" in output
    assert "hit rate   50.0%" in output
    assert "saved      7 tokens" in output


def test_nobody_there_is_a_failure_not_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trace(tmp_path, *"abcdefgh")
    assert main([file, "--url", "http://127.0.0.1:9", "--model", "x", "--json"]) == 1
    (result,) = orjson.loads(capsys.readouterr().out)["passes"]
    assert result["failures"] == 8
    assert len(result["failure_reasons"]) == 5
    assert result["hit_rate"] is None
    assert main([file, "--url", "http://127.0.0.1:9"]) == 1
    assert "--model" in capsys.readouterr().err


def test_a_trace_without_text_is_refused_clearly(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "counts.jsonl"
    path.write_text('{"prompt": "x"}\n{"timestamp": 0, "input_length": 40160, "output_length": 6, "hash_ids": [0]}\n')
    assert main([str(path), "--url", url]) == 1
    assert "row 2: the trace carries no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["f"], ["f", "--url", "u", "--passes", "0"], ["f", "--url", "u", "--speed", "-1"], ["f", "--url", "u", "--x"]],
)
def test_a_wrong_command_line_ends_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_both_kinds_of_trace_are_read_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"timestamp_ms": 1500, "prompt": "a", "output_tokens": 3}\n{"timestamp": 2500000, "input": "b"}\n')
    assert list(read_trace(path)) == [Asked("a", 1.5), Asked("b", 2.5)]
    path.write_text('{"input": 5}')
    with pytest.raises(DataError, match="carries no text"):
        list(read_trace(path))


async def test_arrival_times_are_scaled() -> None:
    requests = [Asked("a", 100.0), Asked("b", 100.4), Asked("c", 100.2)]
    started = asyncio.get_running_loop().time()
    order = [request.text async for request in arrivals(iter(requests), 8.0)]
    assert order == ["a", "b", "c"]
    assert asyncio.get_running_loop().time() - started >= 0.049


@pytest.mark.parametrize(
    ("header", "outcome"),
    [
        ("hitpath; hit; ttl=5; detail=exact", ("exact", "")),
        ("hitpath; hit; ttl=5; detail=semantic", ("semantic", "")),
        ("hitpath; fwd=miss; fwd-status=200; collapsed", ("collapsed", "")),
        ("hitpath; fwd=miss; fwd-status=200; stored", ("miss", "miss")),
        ("hitpath; fwd=stale; fwd-status=200", ("miss", "stale")),
        ('hitpath; fwd=bypass; detail="no-store"', ("miss", "bypass no-store")),
    ],
)
def test_cache_status_is_read(header: str, outcome: tuple[str, str]) -> None:
    assert outcome_of(header) == outcome


def test_an_answer_without_cache_status_is_a_miss_that_says_so() -> None:
    assert outcome_of(None)[1].startswith("no Cache-Status")
