"""Runs other people's load tools against the engine: guidellm, and lmcache's bench with two of its workloads.

`python -m loadtest.engine.foreign [--url URL] [--only guidellm,long-doc-qa,multi-round-chat] [--cache DIR] [--json]`.
Without `--url` it starts an engine with the bundled model. The tools are installed once, each into an environment of
its own below the cache directory, never into that of Hitpath; nothing is downloaded but packages. Exit codes: 0 no
request failed, 1 one did, or a tool.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.checkpoint import BUNDLED
from loadtest.bench_client import BenchError
from loadtest.engine.process import serving

_TORCH = "torch==2.13.0"
"""Installed first: on a machine without a GPU nothing else then brings CUDA's libraries."""
_LIMIT = 600.0
"""Seconds a tool may take."""


@dataclass(frozen=True, slots=True)
class Tool:
    """Something to install."""

    name: str
    packages: tuple[str, ...]

    def installed(self) -> str:
        """What is written down when it is: an environment with anything else in it is made anew."""
        return "\n".join((_TORCH, *self.packages))


GUIDELLM = Tool("guidellm", ("guidellm==0.8.1",))
LMCACHE = Tool("lmcache", ("lmcache==0.5.6", "openai>=2"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a tool saw."""

    name: str
    answered: int
    failed: int
    summary: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether everything was answered."""
        return self.answered > 0 and self.failed == 0


@dataclass(frozen=True, slots=True)
class Target:
    """The engine, its model, and a directory with that model's tokenizer."""

    url: str
    model: str
    tokenizer: Path


def guidellm(target: Target, binaries: Path, out: Path) -> Verdict:
    """Synthetic chats, eight at a time, streamed."""
    report = out / "guidellm.json"
    _call(
        binaries / "guidellm",
        "run",
        *("--backend", f"kind=openai_http,target={target.url},model={target.model}"),
        *("--profile", "kind=concurrent,streams=8"),
        *("--constraint", "kind=max_requests,count=64"),
        *("--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=200,output_tokens=32"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    )
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    return Verdict(
        "guidellm",
        totals["successful"],
        totals["errored"],
        {
            "requests per second": metrics["requests_per_second"]["successful"]["mean"],
            "output tokens per second": metrics["output_tokens_per_second"]["successful"]["mean"],
            "first token, median ms": metrics["time_to_first_token_ms"]["successful"]["median"],
        },
    )


def long_doc_qa(target: Target, binaries: Path, out: Path) -> Verdict:
    """Questions about a few long documents, several at a time."""
    sizes = ("--ldqa-document-length", "1500", "--ldqa-query-per-document", "4", "--ldqa-max-output-length", "32")
    return _lmcache(target, binaries, out, "long-doc-qa", "--kv-cache-volume", "0.03", *sizes)


def multi_round_chat(target: Target, binaries: Path, out: Path) -> Verdict:
    """Chats that grow round by round, at a fixed rate."""
    sizes = ("--mrc-shared-prompt-length", "300", "--mrc-chat-history-length", "600", "--mrc-user-input-length", "30")
    pace = ("--mrc-output-length", "32", "--mrc-qps", "2", "--mrc-duration", "20")
    return _lmcache(target, binaries, out, "multi-round-chat", "--kv-cache-volume", "0.02", *sizes, *pace)


def _lmcache(target: Target, binaries: Path, out: Path, workload: str, *arguments: str) -> Verdict:
    folder = out / workload
    folder.mkdir()
    _call(
        binaries / "lmcache",
        *("bench", "engine", "--no-interactive", "--quiet", "--json", "--no-csv"),
        *("--engine-url", target.url, "--model", target.model, "--workload", workload),
        *("--tokens-per-gb-kvcache", "200000", "--output-dir", str(folder)),
        *arguments,
    )
    results = json.loads((folder / "bench_summary.json").read_text())["results"]
    return Verdict(
        f"lmcache {workload}",
        results["successful_requests"],
        results["failed_requests"],
        {
            "output tokens per second": results["output_throughput"],
            "first token, median ms": results["p50_ttft_ms"],
            "first token, 99th ms": results["p99_ttft_ms"],
        },
    )


Run = Callable[[Target, Path, Path], Verdict]
RUNS: Mapping[str, tuple[Tool, Run]] = MappingProxyType(
    {
        "guidellm": (GUIDELLM, guidellm),
        "long-doc-qa": (LMCACHE, long_doc_qa),
        "multi-round-chat": (LMCACHE, multi_round_chat),
    }
)


def install(tool: Tool, cache: Path) -> Path:
    """The folder of its commands; made on first use. Raises BenchError when a package cannot be installed."""
    home, done = cache / tool.name, cache / f"{tool.name}.installed"
    if not (done.exists() and done.read_text() == tool.installed()):
        print(f"installing {tool.name} into {home} …", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        for packages in ((_TORCH,), tool.packages):
            _call(home / "bin" / "python", "-m", "pip", "install", "--quiet", *packages, limit=1800)
        done.write_text(tool.installed())
    return home / "bin"


def _call(command: Path, *arguments: str, limit: float = _LIMIT) -> None:
    # No tool may fetch a model or report home; both would be foreign to what is measured.
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    environment = {**os.environ, **quiet, "OPENAI_API_KEY": "none"}
    try:
        done = subprocess.run(
            [command, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{command.name} {arguments[0]} took more than {limit:.0f} s") from error
    if done.returncode:
        raise BenchError(f"{command.name} {arguments[0]} failed ({done.returncode}):\n{done.stdout[-4000:]}")


@contextlib.contextmanager
def _target(url: str | None, tokenizer: Path) -> Iterator[Target]:
    if url is None:
        with serving("--model", "bundled") as served:
            yield Target(served.url, "bundled", tokenizer)
    else:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
            models: dict[str, Any] = json.load(response)
        yield Target(url.rstrip("/"), models["data"][0]["id"], tokenizer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tools and print what they saw; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine.foreign", description=__doc__)
    parser.add_argument("--url", help="a running engine (default: start one)")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED, help="directory with the model's tokenizer")
    parser.add_argument("--only", type=_names, default=tuple(RUNS), metavar="NAME,...", help=f"of {', '.join(RUNS)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hitpath-load-tools"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where tools are installed (default: {cache})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    verdicts: list[Verdict] = []
    try:
        places = {name: install(RUNS[name][0], options.cache) for name in options.only}
        with _target(options.url, options.tokenizer) as target, tempfile.TemporaryDirectory() as out:
            verdicts += [RUNS[name][1](target, places[name], Path(out)) for name in options.only]
    except (BenchError, OSError) as error:
        print(f"foreign: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            print(_line(verdict))
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _line(verdict: Verdict) -> str:
    said = ", ".join(f"{name} {value:.1f}" for name, value in verdict.summary.items())
    word = "holds" if verdict.holds else "DOES NOT HOLD"
    return f"{verdict.name}: {verdict.answered} answered, {verdict.failed} failed; {said}: {word}"


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(RUNS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
