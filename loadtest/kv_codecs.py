"""Size, speed and cost of every codec for stored keys and values, on those of a model that has read real text.

`python -m loadtest.kv_codecs [--model DIR]` prints the table of docs/kv-tiers.md. Each sample is a stretch of text
whose keys and values are computed, written, read back and put where they were; the tokens that follow are then computed
over both, and what the model expects next is compared: KL(full precision ‖ codec) in nats, and how often both would say
the same. Speeds are of the uncoded bytes, on the threads asked for.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from cachestore.kv.codecs import CODECS, Codec
from cachestore.kv.controller import smallest_within
from cachestore.kv.format import Geometry
from engine.attention import KvPool, Packed
from engine.attention.sdpa import SdpaBackend
from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.errors import CheckpointError
from engine.executor import BLOCK_SIZE
from loadtest.data import DataError, data_dir

T = TypeVar("T")
_TIMED, _ROUNDS = 4, 5
"""Samples on which encoding and decoding are timed, and how often; the fastest counts: others use this machine too."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One codec."""

    codec: str
    size: float
    """Bytes per uncoded byte."""
    encoding: float
    """Uncoded bytes a second."""
    decoding: float
    error: float
    """Length of the difference per length of the original."""
    kl: float
    """Nats a token, mean over tokens and samples."""
    agreement: float
    """Share of tokens after which both would say the same next."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A text in the pool, what the model makes of it, and what follows."""

    pool: KvPool
    kv: Tensor
    """[layers, 2, tokens, kv_heads, head_dim]."""
    following: list[int]
    expected: Tensor
    """Log probabilities float32 [following, V] over the uncoded keys and values."""


def samples(checkpoint: Checkpoint, tokens: list[int], *, count: int, length: int, following: int) -> Iterator[Sample]:
    """Stretches evenly spread over a text. Raises ValueError where it is too short."""
    step = (len(tokens) - length - following) // max(1, count)
    if step < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has no {count} stretches of {length + following}")
    for start in range(0, count * step, step):
        config = checkpoint.config
        pool = KvPool(
            layers=config.layers,
            blocks=-(-(length + following) // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=checkpoint.dtype,
            device=checkpoint.device,
        )
        _compute(checkpoint, pool, tokens[start : start + length], 0)
        kv = torch.stack([torch.stack((layer.keys, layer.values)).flatten(1, 2)[:, :length] for layer in pool.layers])
        after = tokens[start + length : start + length + following]
        yield Sample(pool, kv, after, _compute(checkpoint, pool, after, length))


def measure(checkpoint: Checkpoint, given: list[Sample], codec: Codec) -> Measured:
    """Write and read the samples, and compare what the model makes of them."""
    geometry = geometry_of(checkpoint)
    sizes, plain = 0, 0
    encoding, decoding = [], []
    errors, divergences, agreements = [], [], []
    for index, sample in enumerate(given):
        rounds = _ROUNDS if index < _TIMED else 1
        length = sample.kv.shape[2]
        forms = geometry.forms(length)
        parts = [sample.kv[form.first : form.first + form.layers] for form in forms]
        seconds, codes = _timed(rounds, lambda: [codec.encode(p, f) for p, f in zip(parts, forms, strict=True)])  # noqa: B023
        encoding.append(seconds)
        seconds, back = _timed(rounds, lambda: [codec.decode(c, f) for c, f in zip(codes, forms, strict=True)])  # noqa: B023
        decoding.append(seconds)
        sizes += sum(map(len, codes))
        plain += sum(form.nbytes for form in forms)
        kv = torch.cat(back)
        errors.append(float((kv.float() - sample.kv.float()).norm() / sample.kv.float().norm()))
        got = _over(checkpoint, sample, kv)
        divergences.append(float((sample.expected.exp() * (sample.expected - got)).sum(-1).mean()))
        agreements.append(float((sample.expected.argmax(-1) == got.argmax(-1)).float().mean()))
    return Measured(
        codec.name,
        sizes / plain,
        plain / len(given) / fmean(encoding[:_TIMED]),
        plain / len(given) / fmean(decoding[:_TIMED]),
        fmean(errors),
        max(0.0, fmean(divergences)),
        fmean(agreements),
    )


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """What the checkpoint's keys and values are stored as."""
    config = checkpoint.config
    return Geometry(checkpoint.fingerprint, config.layers, config.kv_heads, config.head_dim, checkpoint.dtype)


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = [
        "| codec | size | encode GB/s | decode GB/s | error | KL (nats) | same next token |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.codec}` | {r.size:.3f} | {r.encoding / 1e9:.2f} | {r.decoding / 1e9:.2f} | {r.error:.4f} | {r.kl:.1e} "
        f"| {r.agreement:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def text_tokens(checkpoint: Checkpoint, directory: Path, characters: int) -> list[int]:
    """The middle of the first text of the measurement data, as token ids. Raises DataError."""
    files = sorted((directory / "text").glob("*.txt.gz"))
    if not files:
        raise DataError(f"{directory / 'text'}: no *.txt.gz")
    with gzip.open(files[0], "rt", encoding="utf-8", errors="replace") as file:
        text = file.read(2 * characters)
    return list(checkpoint.tokenizer.encode_text(text[len(text) // 2 :]))


def _compute(checkpoint: Checkpoint, pool: KvPool, ids: list[int], start: int) -> Tensor:
    """Log probabilities float32 [ids, V] of one sequence whose first `start` tokens are in the pool."""
    end = start + len(ids)
    positions = torch.arange(start, end)
    packed = Packed(
        ids=torch.tensor(ids),
        positions=positions,
        slots=positions,
        tables=torch.arange(-(-end // BLOCK_SIZE), dtype=torch.int32)[None],
        starts=torch.tensor([0, len(ids)], dtype=torch.int32),
        lengths=torch.tensor([end], dtype=torch.int32),
        counts=(len(ids),),
        totals=(end,),
        drawing=torch.arange(len(ids)),
        spans=torch.full((len(ids),), end) if checkpoint.model.rope.stretches else None,
    )
    with torch.inference_mode():
        hidden = checkpoint.model.forward(packed, pool, SdpaBackend())
        return checkpoint.model.logits(hidden).float().log_softmax(-1)


def _over(checkpoint: Checkpoint, sample: Sample, kv: Tensor) -> Tensor:
    """What the model expects after each following token, over these keys and values."""
    length = kv.shape[2]
    for layer, part in zip(sample.pool.layers, kv, strict=True):
        layer.keys.flatten(0, 1)[:length] = part[0]
        layer.values.flatten(0, 1)[:length] = part[1]
    return _compute(checkpoint, sample.pool, sample.following, length)


def _timed(rounds: int, work: Callable[[], T]) -> tuple[float, T]:
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.kv_codecs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint; default: the bundled one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512, help="of each chunk")
    parser.add_argument("--following", type=int, default=64, help="tokens whose expectations are compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gate", type=float, default=1e-3, help="the KL at most, for naming the smallest codec within")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Exit code 2 where data or checkpoint cannot be read."""
    options = _parsed(arguments)
    torch.set_num_threads(options.threads)
    try:
        checkpoint = load_checkpoint(options.model, name=options.model.name, dtype=options.dtype)
        tokens = text_tokens(checkpoint, data_dir(), 12 * options.samples * (options.tokens + options.following))
        given = list(
            samples(checkpoint, tokens, count=options.samples, length=options.tokens, following=options.following)
        )
    except (CheckpointError, DataError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = [measure(checkpoint, given, codec) for codec in CODECS.values()]
    loss: Mapping[str, float] = {row.codec: row.kl for row in rows}
    size = {row.codec: row.size for row in rows}
    print(table(rows))
    print(f"\nsmallest with KL ≤ {options.gate:g}: {smallest_within(loss, size, options.gate)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
