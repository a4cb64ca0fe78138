"""The bench measures, on a small scale; how fast it is, is no test's business."""

from __future__ import annotations

import asyncio
import json

import pytest

from loadtest import bench
from loadtest.bench import Scale
from loadtest.bench_client import BenchError, chat, connect, load
from loadtest.bench_gateway import Sizes, paraphrases, question
from loadtest.table import Bar, Row, absolute, difference, ratio, render

TINY = Scale(Sizes(rounds=1, hits=40, known=10, paraphrases=5, alone=5, misses=20, streams=3), 200)


def test_what_is_measured_over_sockets_comes_out_positive() -> None:
    rows = bench.measure(TINY, ["exact", "semantic", "stream"])
    assert rows[0].name == "exact hits, 8 connections"
    assert all(row.measured > 0 for row in rows)
    assert all(row.ceiling is None or row.ceiling > 0 for row in rows)


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--json", "--quick", "--only", "recall"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quick"] is True
    assert document["machine"]["cores"] >= 1
    assert len(document["figures"]) == 2
    for figure in document["figures"]:
        assert set(figure) == {*Row.__dataclass_fields__, "holds"}
        assert figure["measured"] > 0


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.main(["--only", "exact,nonsense"])
    assert refused.value.code == 2
    assert "'nonsense' is not one of exact," in capsys.readouterr().err


def test_a_bar_in_the_figures_own_unit_speaks_of_the_figure() -> None:
    assert ratio("r", "/s", [400.0], [1000.0], "echo", Bar(">=", 0.4, "x")).holds is True
    assert ratio("r", "/s", [399.0], [1000.0], "echo", Bar(">=", 0.4, "x")).holds is False
    assert ratio("r", "/s", [399.0], [1000.0], "echo", Bar(">=", 390, "/s")).holds is True
    assert difference("d", "ms", [3.0], [1.0], "alone", Bar("<=", 1.5, "ms more")).holds is False
    assert absolute("a", 3.0, "s", Bar("<=", 3, "s")).holds is True
    assert absolute("a", 3.0, "s").holds is None


def test_rounds_are_compared_one_by_one() -> None:
    row = ratio("r", "/s", [10.0, 30.0, 20.0], [10.0, 10.0, 10.0], "echo")
    assert (row.judged, row.low, row.high) == (2.0, 1.0, 3.0)
    assert "2 x (1–3)" in render([row])


def test_every_row_of_the_table_is_as_wide() -> None:
    rows = [absolute("short", 1.0, "s"), ratio("longer name", "/s", [12345.0], [2.0], "echo", Bar(">=", 1, "x"))]
    lines = render(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "12,345 /s" in lines[-1]
    assert lines[-1].rstrip(" |").endswith("yes")


def test_no_paraphrase_comes_twice_or_is_a_question_itself() -> None:
    known = [question(number) for number in range(1000)]
    assert len(set(known)) == 1000
    forms = list(paraphrases(known))
    assert len({*forms, *known}) == len(forms) + 1000


class Scripted:
    """A server that sends given pieces for every request it gets, then hangs up if told to."""

    def __init__(self, pieces: list[bytes], *, hangs_up: bool = False) -> None:
        self._pieces = pieces
        self._hangs_up = hangs_up
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self._clients)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(asyncio.ensure_future(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            for piece in self._pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
            if self._hangs_up:
                break
        writer.close()
        await writer.wait_closed()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b"content-length: 5\r\n\r\nhello"],
        [HEAD[:20], HEAD[20:] + b"content-length: 5\r\n", b"\r\n", b"he", b"llo"],
        [HEAD + b"transfer-encoding: chunked\r\n\r\n", b"5\r\nhello", b"\r\n0\r\n\r\n"],
    ],
)
async def test_the_client_finds_the_end_of_an_answer(pieces: list[bytes]) -> None:
    async with Scripted(pieces) as port:
        connection = await connect(port)
        for _ in range(2):
            answer = await connection.ask(chat("s", "q"))
            assert b"hello" in answer.body
            assert 0 < answer.first <= answer.whole
        connection.close()


async def test_an_empty_body_is_an_answer() -> None:
    async with Scripted([HEAD + b"content-length: 0\r\n\r\n"]) as port:
        connection = await connect(port)
        assert (await connection.ask(chat("s", "q"))).body == b""
        connection.close()


async def test_a_load_sends_every_request_once() -> None:
    async with Scripted([HEAD + b"content-length: 2\r\n\r\nok"]) as port:
        done = await load(port, [chat("s", str(number)) for number in range(20)], connections=3)
    assert len(done.latencies) == 20
    assert done.rate > 0
    assert done.percentile(50) <= done.percentile(99)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"], "502 Bad Gateway"),
        ([HEAD + b"content-length: 2\r\n\r\nok"], "expected 200 with b'detail=exact'"),
    ],
)
async def test_a_load_stops_at_an_answer_that_is_not_what_is_measured(pieces: list[bytes], message: str) -> None:
    async with Scripted(pieces) as port:
        with pytest.raises(BenchError, match=message):
            await load(port, [chat("s", "q")] * 5, connections=1, expect=b"detail=exact")


async def test_a_server_that_hangs_up_is_an_error() -> None:
    async with Scripted([HEAD], hangs_up=True) as port:
        with pytest.raises(BenchError, match="hung up"):
            await load(port, [chat("s", "q")] * 5, connections=2)
