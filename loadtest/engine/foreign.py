"""Runs other people's load tools against the engine: guidellm, and lmcache's bench with four of its workloads.

`python -m loadtest.engine.foreign [--url URL] [--only guidellm,long-doc-qa,…] [--cache DIR] [--json]`. Without `--url`
it starts what is asked: an engine with the bundled model, and for the workloads about chunks (long-doc-permutator,
rag-qa-quality) a gateway before it, once with reuse and once without. The tools are installed once, each into an
environment of its own below the cache directory, never into that of Hitpath; nothing is downloaded but packages. Exit
codes: 0 no request failed, 1 one did, or a tool.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from engine.checkpoint import BUNDLED
from engine.errors import CheckpointError
from engine.reuse.point import FILE
from loadtest import bench_servers as servers
from loadtest.bench_client import BenchError
from loadtest.data import DataError, data_dir, read_rows
from loadtest.engine.process import serving
from loadtest.engine.reusing import Manner, model_of

_TORCH = "torch==2.13.0"
"""Installed first: on a machine without a GPU nothing else then brings CUDA's libraries."""
_LIMIT = 600.0
"""Seconds a tool may take."""
_QUESTIONS, _PASSAGES, _PASSAGE = 12, 5, 800
"""Questions, passages of each, and characters of a passage: about two thousand tokens a prompt."""
_CHUNKS = ("long-doc-permutator", "rag-qa-quality")
"""Run with reuse and without."""


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
    note: str = ""
    """Of the engine's settings, where several are compared."""
    figures: Callable[[], Mapping[str, float]] = dict
    """What the engine counts, by name in `/metrics` and kind."""


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


def long_doc_permutator(target: Target, binaries: Path, out: Path) -> Verdict:
    """The same documents in ever another order."""
    sizes = ("--ldp-num-contexts", "5", "--ldp-context-length", "200", "--ldp-system-prompt-length", "32")
    counts = ("--ldp-num-permutations", "20", "--ldp-max-output-length", "16")
    return _reusing(target, binaries, out, "long-doc-permutator", "--kv-cache-volume", "1", *sizes, *counts)


def rag_qa_quality(target: Target, binaries: Path, out: Path) -> Verdict:
    """Questions about several passages each, behind the passages one by one."""
    questions = out / "questions.jsonl"
    write_questions(data_dir() / "rag" / "musique150.jsonl.gz", questions)
    sizes = ("--rag-dataset", str(questions), "--rag-num-samples", str(_QUESTIONS), "--rag-max-output-length", "16")
    return _reusing(target, binaries, out, "rag-qa-quality", *sizes, "--rag-doc-align-tokens", "64")


def write_words(directory: Path) -> None:
    """Fill a directory with a tokenizer of made-up words: the tool wants 8000, more than the bundled model's has."""
    syllables = ["".join(pair) for pair in itertools.product("bcdfghjklmnprstvwz", "aeiou")]
    words = ["Ġ" + "".join(pair) for pair in itertools.product(syllables, repeat=2)]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(directory / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(kind))


def write_questions(source: Path, target: Path) -> None:
    """Questions of the measurement data, so short that the bundled model's context holds them. Raises DataError."""
    with target.open("w") as file:
        for row in itertools.islice(read_rows(source), _QUESTIONS):
            passages = [{**one, "text": one["text"][:_PASSAGE]} for one in row["ctxs"][:_PASSAGES]]
            file.write(json.dumps({**row, "ctxs": passages}) + "\n")


def _reusing(target: Target, binaries: Path, out: Path, workload: str, *arguments: str) -> Verdict:
    """What the tool says, and what the engine did not have to compute meanwhile.

    The tool's tokens are words here, each of which is two or three of the bundled model's.
    """
    words = Path(tempfile.mkdtemp(dir=out))
    write_words(words)
    before = target.figures()
    verdict = _lmcache(replace(target, tokenizer=words), binaries, out, workload, *arguments)
    after = target.figures()
    done = {name: after[name] - before.get(name, 0.0) for name in after}
    if not (prompts := done.get("vllm:prompt_tokens_total", 0.0)):
        return verdict
    kept = done.get("hitpath_engine_reuse_tokens_totalkept", 0.0)
    shares = {"% known as prefix": done["vllm:prefix_cache_hits_total"], "% brought by chunks": kept}
    return replace(
        verdict,
        name=f"{verdict.name}{target.note}",
        summary=verdict.summary | {name: 100 * count / prompts for name, count in shares.items()},
    )


def _lmcache(target: Target, binaries: Path, out: Path, workload: str, *arguments: str) -> Verdict:
    folder = Path(tempfile.mkdtemp(prefix=workload, dir=out))
    # It takes the model's name for the place of its tokenizer.
    (folder / target.model).symlink_to(target.tokenizer.resolve(), target_is_directory=True)
    _call(
        binaries / "lmcache",
        *("bench", "engine", "--no-interactive", "--quiet", "--json", "--no-csv"),
        *("--engine-url", target.url, "--model", target.model, "--workload", workload),
        *("--tokens-per-gb-kvcache", "200000", "--output-dir", str(folder)),
        *arguments,
        place=folder,
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
        "long-doc-permutator": (LMCACHE, long_doc_permutator),
        "rag-qa-quality": (LMCACHE, rag_qa_quality),
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


def _call(command: Path, *arguments: str, limit: float = _LIMIT, place: Path | None = None) -> None:
    # No tool may fetch a model or report home; both would be foreign to what is measured.
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    environment = {**os.environ, **quiet, "OPENAI_API_KEY": "none"}
    try:
        done = subprocess.run(
            [command, *arguments],
            env=environment,
            cwd=place,
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
def _both(reuse: bool) -> Iterator[Target]:
    """An engine with reuse or without, and before it a gateway that answers nothing by itself but what it must."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        Manner().point(model_of("bundled", "auto")[1]).save(folder / FILE)
        flags = ("--reuse-point", str(folder / FILE), "--kv-disk", str(folder / "kv")) if reuse else ("--reuse", "off")
        with serving("--model", "bundled", *flags) as served:
            engine = servers.Server(served.process, int(served.url.rpartition(":")[2]))
            core = servers.Cores.choose().client
            with servers.gateway(folder, core, engine, {"embedder": {"kind": "none"}}) as gateway:
                url, note = f"http://127.0.0.1:{gateway.port}", f", reuse {'on' if reuse else 'off'}"
                yield Target(url, "bundled", BUNDLED, note, partial(_figures, served.url))


def _figures(url: str) -> Mapping[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {f"{sample.name}{sample.labels.get('kind', '')}": sample.value for sample in samples}


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
    try:
        verdicts = _run(options.only, options.url, options.tokenizer, options.cache)
    except (BenchError, CheckpointError, DataError, OSError) as error:
        print(f"foreign: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            print(_line(verdict))
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _run(names: Sequence[str], url: str | None, tokenizer: Path, cache: Path) -> list[Verdict]:
    places = {name: install(RUNS[name][0], cache) for name in names}
    with tempfile.TemporaryDirectory() as out:

        def verdicts(target: Target, some: Sequence[str]) -> list[Verdict]:
            return [RUNS[name][1](target, places[name], Path(out)) for name in some]

        apart = [name for name in names if url is None and name in _CHUNKS]
        found: list[Verdict] = []
        if plain := [name for name in names if name not in apart]:
            with _target(url, tokenizer) as target:
                found += verdicts(target, plain)
        for name, reuse in itertools.product(apart, (False, True)):
            with _both(reuse) as target:  # a fresh one for each: nothing is known before
                found += verdicts(target, [name])
        return found


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
