"""How the foreign tools are called and judged; scripts stand in for them, which ask the server themselves."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from loadtest.engine.foreign import GUIDELLM, LMCACHE, main, write_questions, write_words

GUIDELLM_SCRIPT = """
import json, os, sys, urllib.request
assert os.environ["HF_HUB_OFFLINE"] == "1"
backend = dict(pair.split("=", 1) for pair in sys.argv[sys.argv.index("--backend") + 1].split(","))
urllib.request.urlopen(backend["target"] + "/v1/models")
output = dict(pair.split("=", 1) for pair in sys.argv[sys.argv.index("--output") + 1].split(","))
rate = {"successful": {"mean": 2.0, "median": 3.0}}
metrics = {
    "request_totals": {"successful": 64, "errored": ERRORS},
    "requests_per_second": rate, "output_tokens_per_second": rate, "time_to_first_token_ms": rate,
}
open(output["path"], "w").write(json.dumps({"benchmarks": [{"metrics": metrics}]}))
"""
LMCACHE_SCRIPT = """
import json, pathlib, sys
assert sys.argv[1:3] == ["bench", "engine"]
assert sys.argv[sys.argv.index("--model") + 1] == "served"
assert pathlib.Path("served", "tokenizer.json").is_file()
if "rag-qa-quality" in sys.argv:
    questions = pathlib.Path(sys.argv[sys.argv.index("--rag-dataset") + 1]).read_text().splitlines()
    assert [len(passage["text"]) for passage in json.loads(questions[0])["ctxs"]] == [800, 3]
results = {
    "successful_requests": 16, "failed_requests": ERRORS,
    "output_throughput": 5.0, "p50_ttft_ms": 6.0, "p99_ttft_ms": 7.0,
}
folder = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
(folder / "bench_summary.json").write_text(json.dumps({"results": results}))
"""


class _Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "served"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def tools(cache: Path, *, errors: int = 0, lmcache: str = LMCACHE_SCRIPT) -> list[str]:
    """Install the stand-ins; returns the flag that names where."""
    for tool, script in ((GUIDELLM, GUIDELLM_SCRIPT), (LMCACHE, lmcache)):
        command = cache / tool.name / "bin" / tool.name
        command.parent.mkdir(parents=True)
        command.write_text(f"#!{sys.executable}\n{script.replace('ERRORS', str(errors))}")
        command.chmod(0o755)
        (cache / f"{tool.name}.installed").write_text(tool.installed())
    return ["--cache", str(cache)]


def test_what_each_tool_saw_is_told(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url, "--only", "guidellm,long-doc-qa,multi-round-chat", *tools(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "guidellm: 64 answered, 0 failed; requests per second 2.0, output tokens per second 2.0, "
        "first token, median ms 3.0: holds",
        *(
            f"lmcache {name}: 16 answered, 0 failed; output tokens per second 5.0, first token, median ms 6.0, "
            "first token, 99th ms 7.0: holds"
            for name in ("long-doc-qa", "multi-round-chat")
        ),
    ]


def test_workloads_about_chunks_get_what_they_want(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "rag").mkdir(parents=True)
    row = {"question": "Who?", "answers": ["I"], "ctxs": [{"text": "a" * 9000}, {"text": "abc"}]}
    (tmp_path / "data" / "rag" / "musique150.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    monkeypatch.setenv("HITPATH_DATA", str(tmp_path / "data"))
    assert main(["--url", url, "--only", "long-doc-permutator,rag-qa-quality", *tools(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out.count("16 answered, 0 failed") == 2


def test_questions_are_cut_to_size(tmp_path: Path) -> None:
    source, target = tmp_path / "all.jsonl", tmp_path / "few.jsonl"
    rows = [{"question": str(i), "answers": ["x"], "ctxs": [{"text": "b" * 2000}] * 20} for i in range(50)]
    source.write_text("\n".join(map(json.dumps, rows)))
    write_questions(source, target)
    kept = list(map(json.loads, target.read_text().splitlines()))
    assert [row["question"] for row in kept] == [str(i) for i in range(12)]
    assert {len(row["ctxs"]) for row in kept} == {5}


def test_made_up_words_are_one_token_each(tmp_path: Path) -> None:
    write_words(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() > 8000
    assert tokenizer.encode(" baba zozo").tokens == ["Ġbaba", "Ġzozo"]


def test_one_failed_request_is_one_too_many(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url, "--only", "long-doc-qa", "--json", *tools(tmp_path, errors=1)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["answered"], found["failed"], found["holds"]) == (16, 1, False)


def test_a_tool_that_breaks_shows_its_last_words(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = "import sys; print('out of luck'); sys.exit(3)"
    assert main(["--url", url, "--only", "multi-round-chat", *tools(tmp_path, lmcache=broken)]) == 1
    said = capsys.readouterr().err
    assert "lmcache bench failed (3)" in said
    assert "out of luck" in said


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "locust"])
    assert refused.value.code == 2
    assert (
        "'locust' is not one of guidellm, long-doc-qa, multi-round-chat, long-doc-permutator, rag-qa-quality"
        in capsys.readouterr().err
    )
