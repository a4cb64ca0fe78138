"""The engine's command line."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Attention = Literal["auto", "sdpa", "avx512", "avx2", "triton", "varlen"]
"""See `engine.attention.choose`."""
_CODECS = ("raw", "fp8", "int8", "int4", "int2", "entropy", "mixed")
"""As `cachestore.kv.codecs.CODECS`, which is not imported here: it needs torch."""
_DISK_SIZE = 16 * 2**30
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class ReuseSettings:
    """How text that was computed before is used again, and where it is kept."""

    on: bool
    """Where an operating point is found."""
    point: Path | None
    """None: `reuse.json` beside the model, if it is there."""
    host: int
    """Bytes of memory for stored chunks."""
    disk: Path | None
    disk_size: int
    """Bytes of files there."""
    quota: int | None
    """Bytes of chunks that each tenant may have; None: as many as there is room for."""
    redis: str | None
    tags: tuple[str, ...]
    separators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line, checked."""

    model: str
    served_name: str
    host: str
    port: int
    uds: str | None
    device: str
    dtype: str
    kv_memory: int | None
    """Bytes; None leaves it to the device."""
    context: int | None
    """Tokens; None takes what model and memory allow."""
    attention: Attention
    threads: int
    max_running: int
    max_waiting: int
    token_budget: int | None
    """Tokens computed in one step; None leaves it to the device."""
    patience: int
    """Seconds after which a waiting answer is overtaken no more."""
    kv_events: str | None
    kv_events_replay: str | None
    kv_events_topic: str
    reuse: ReuseSettings
    grace: int
    parent_pid: int | None


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """The command line of `calibrate`, checked."""

    model: str
    prompts: Path | None
    prompts_limit: int
    out: Path | None
    most_kl: float
    least_agreement: float
    codec: str
    least: int
    device: str
    dtype: str
    threads: int


def parse_calibration(arguments: Sequence[str]) -> CalibrationSettings:
    """Read the command line behind `calibrate`; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="hitpath engine calibrate", description="Measure how chunks can be reused with a model."
    )
    _add_model(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL, {"chunks": [...], "question": ...} or {"messages": [...]} a line (default: the model writes some)',
    )
    parser.add_argument(
        "--prompts-limit", type=_positive, default=32, help="prompts measured at the most: time (default: 32)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="operating point (default: reuse.json in the model)")
    parser.add_argument(
        "--loss",
        type=_loss,
        default=_loss(""),
        metavar="kl=NATS,agreement=SHARE",
        help="what may be lost: mean KL, share of equal tokens (default: kl=0.02,agreement=0.95)",
    )
    parser.add_argument(
        "--codec",
        choices=("auto", *_CODECS),
        default="auto",
        help="of stored chunks (default: auto, the first of entropy, int8 and raw that loses no more than may be lost)",
    )
    parser.add_argument("--least", type=_positive, default=64, help="tokens of the smallest chunk (default: 64)")
    given = vars(parser.parse_args(arguments))
    most_kl, least_agreement = given.pop("loss")
    return CalibrationSettings(**given, most_kl=most_kl, least_agreement=least_agreement)


def _loss(text: str) -> tuple[float, float]:
    """`kl=0.02,agreement=0.95`, either or both."""
    found = {"kl": 0.02, "agreement": 0.95}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not kl=NATS or agreement=SHARE") from None
    if found.keys() != {"kl", "agreement"} or not 0 < found["kl"] < math.inf or not 0 < found["agreement"] <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write kl=NATS above 0, agreement=SHARE from 0 to 1")
    return found["kl"], found["agreement"]


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="hitpath engine",
        description="The bundled OpenAI-compatible engine.",
        epilog="`hitpath engine calibrate --help`: find out what of a model's stored chunks can be reused.",
    )
    _add_model(parser)
    _add_serving(parser)
    _add_steps(parser)
    _add_events(parser)
    _add_reuse(parser)
    given = vars(parser.parse_args(arguments))
    if given["token_budget"] is not None and given["token_budget"] < given["max_running"]:
        parser.error(f"--token-budget {given['token_budget']} is less than --max-running {given['max_running']}")
    if given["kv_events"] is None and (given["kv_events_replay"] or given["kv_events_topic"]):
        parser.error("--kv-events-replay and --kv-events-topic need --kv-events")
    given["served_name"] = given["served_name"] or Path(given["model"]).resolve().name
    return Settings(reuse=_reuse(parser, given), **given)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="directory in the Hugging Face layout, or `bundled`")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument(
        "--threads", type=_positive, default=usable_cores(), help="default: the cores this process may use"
    )


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--served-name", help="model name clients use (default: the directory's name)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--port", type=_port, default=8081, help="0 takes a free one (default: 8081)")
    where.add_argument("--uds", help="path of a UNIX socket to listen on instead")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--grace", type=_positive, default=10, help="seconds to finish answers when stopped")
    parser.add_argument("--parent-pid", type=_positive, help="stop when this process is gone")


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-memory", type=size, help="bytes for keys and values (default: 1GiB; most of a GPU)")
    parser.add_argument("--context", type=_positive, help="most tokens of prompt and answer together")
    parser.add_argument("--attention", choices=get_args(Attention), default="auto", help="kernels (default: auto)")
    parser.add_argument("--max-running", type=_positive, default=64, help="answers computed together (default: 64)")
    parser.add_argument("--max-waiting", type=_positive, default=256, help="answers that may wait (default: 256)")
    parser.add_argument(
        "--token-budget", type=_positive, help="tokens computed in one step (default: 512; 8192 on a GPU)"
    )
    parser.add_argument(
        "--patience", type=_positive, default=30, help="seconds after which a waiting answer is overtaken no more"
    )


def _add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-events", metavar="ENDPOINT", help="publish KV events there, e.g. tcp://*:5557")
    parser.add_argument("--kv-events-replay", metavar="ENDPOINT", help="answer requests for missed KV events there")
    parser.add_argument("--kv-events-topic", default="", help="topic of the KV events (default: empty)")


def _add_reuse(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reuse of text that was computed before (docs/chunk-reuse.md)")
    group.add_argument(
        "--reuse", choices=("auto", "off"), default="auto", help="auto: where an operating point is found"
    )
    group.add_argument("--reuse-point", type=Path, metavar="FILE", help="operating point (default: MODEL/reuse.json)")
    group.add_argument("--kv-host", type=size, default=2**30, metavar="SIZE", help="memory for chunks (default: 1GiB)")
    group.add_argument("--kv-disk", type=Path, metavar="DIR", help="keep chunks in files there as well")
    group.add_argument("--kv-disk-size", type=size, metavar="SIZE", help="bytes of files (default: 16GiB)")
    group.add_argument("--kv-quota", type=size, metavar="SIZE", help="bytes of chunks of each tenant (default: all)")
    group.add_argument("--kv-redis", type=_redis, metavar="URL", help="keep chunks in this Redis as well")
    group.add_argument(
        "--chunk-tags", type=_tags, default=(), metavar="A,B", help="what stands in <A>…</A> is a text of its own"
    )
    group.add_argument(
        "--chunk-separators",
        type=_separators,
        default=(),
        metavar="A,B",
        help=r"what stands between these is a text of its own; write \n, \t and \, for line end, tab and comma",
    )


def _reuse(parser: argparse.ArgumentParser, given: dict[str, Any]) -> ReuseSettings:
    """Take what `_add_reuse` has added out; exit where flags contradict each other."""
    if given["kv_disk_size"] is not None and given["kv_disk"] is None:
        parser.error("--kv-disk-size needs --kv-disk")
    flags = ("reuse_point", "kv_disk", "kv_quota", "kv_redis", "chunk_tags", "chunk_separators")
    told = [flag for flag in flags if given[flag]]
    if given["reuse"] == "off" and told:
        parser.error(f"--reuse off: --{told[0].replace('_', '-')} has no meaning then")
    return ReuseSettings(
        on=given.pop("reuse") == "auto",
        point=given.pop("reuse_point"),
        host=given.pop("kv_host"),
        disk=given.pop("kv_disk"),
        disk_size=given.pop("kv_disk_size") or _DISK_SIZE,
        quota=given.pop("kv_quota"),
        redis=given.pop("kv_redis"),
        tags=given.pop("chunk_tags"),
        separators=given.pop("chunk_separators"),
    )


def size(text: str) -> int:
    """Bytes of `512MiB`, `2GB` or a bare number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512MiB, 2GB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def usable_cores() -> int:
    """Cores that affinity and the container's CPU limit leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number: no limit
    return cores


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _redis(text: str) -> str:
    if not re.fullmatch(r"rediss?://\S+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like redis://host:6379/0")
    return text


def _tags(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][\w.:-]*", name):
            raise argparse.ArgumentTypeError(f"{name!r} is not the name of a tag")
    return names


def _separators(text: str) -> tuple[str, ...]:
    found = tuple(re.sub(r"\\(.)", _unescaped, part) for part in re.split(r"(?<!\\),", text))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty separator")
    return found


def _unescaped(found: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(found[1], found[1])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
