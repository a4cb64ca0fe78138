"""`hitpath engine calibrate`: measure how chunks can be reused with a model, and write the operating point.

Exit codes: 0 written, 1 nothing is within the stated loss (or the file cannot be written), 2 the command line, the
checkpoint or the prompts are wrong.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import cast

import torch

from engine.assembly import speed_up
from engine.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from engine.errors import CheckpointError, RequestError, SettingsError
from engine.reuse.calibrate import ANSWER, Calibration, Candidate, Limits, Table, chosen, grid, nearest, table_of
from engine.reuse.examples import Sample, read, sample_of, written
from engine.reuse.point import Dtype, OperatingPoint, beside
from engine.settings import CalibrationSettings

_SMALLEST_FIRST = ("entropy", "int8", "raw")
"""Codecs that are tried one after the other: the smallest one that stays within what may be lost is taken."""


def calibrate(settings: CalibrationSettings) -> int:
    """Run it; returns the exit code."""
    torch.set_num_threads(settings.threads)
    directory = BUNDLED if settings.model == "bundled" else Path(settings.model)
    try:
        if settings.out is not None and not settings.out.parent.is_dir():
            raise SettingsError(f"--out: {settings.out.parent}: no such directory")
        checkpoint = load_checkpoint(directory, name=directory.name, device=_device(settings), dtype=settings.dtype)
        out = settings.out or beside(directory, checkpoint.dtype)
        speed_up(checkpoint)
        samples = _samples(checkpoint, settings)
        limits = Limits(settings.most_kl, settings.least_agreement)
        for codec in _SMALLEST_FIRST if settings.codec == "auto" else (settings.codec,):
            table = _measured(Calibration(checkpoint, samples, codec), len(samples))
            best = chosen(table, limits)
            print(f"codec {codec}\n{table_of(table, best)}", flush=True)
            if best is not None:
                return _written(_point(checkpoint, settings, codec, best, table), out)
            print(_refusal(codec, table, limits), file=sys.stderr)
    except (CheckpointError, SettingsError) as error:
        print(f"hitpath engine calibrate: {error}", file=sys.stderr)
        return 2
    print("hitpath engine calibrate: no operating point is written; the engine computes everything.", file=sys.stderr)
    return 1


def _device(settings: CalibrationSettings) -> str:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: there is no CUDA device here")
    return "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"


def _samples(checkpoint: Checkpoint, settings: CalibrationSettings) -> list[Sample]:
    context = checkpoint.config.max_positions
    if settings.prompts is None:
        print("writing prompts with the model itself", file=sys.stderr, flush=True)
        examples = written(checkpoint, settings.prompts_limit, context)
    else:
        examples = read(settings.prompts, settings.prompts_limit)
    found = []
    for number, example in enumerate(examples, 1):
        try:
            sample = sample_of(example, checkpoint.tokenizer, settings.least)
        except RequestError as error:
            raise SettingsError(f"--prompts: prompt {number}: {error.message}") from error
        if sample is not None and len(sample.tokens) + ANSWER <= context:
            found.append(sample)
    if len(found) < len(examples):
        print(f"{len(examples) - len(found)} of {len(examples)} prompts have no chunk or do not fit", file=sys.stderr)
    if len(found) < 2:
        raise SettingsError(
            f"--prompts: {len(found)} of {len(examples)} prompts have a chunk of {settings.least} tokens and fit the "
            f"model's context of {context}; two are needed at least"
        )
    return found


def _measured(calibration: Calibration, total: int) -> Table:
    table: Table = {}
    began = time.monotonic()
    for done, found in enumerate(calibration.run(grid()), 1):
        table = found
        print(f"prompt {done} of {total}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return table


def _refusal(codec: str, table: Table, limits: Limits) -> str:
    one = nearest(table, limits)
    loss = table[one].loss
    return (
        f"codec {codec}: nothing saves time within KL {limits.kl:g} and agreement {limits.agreement:g}; nearest came "
        f"{_named(one.selector, one.ratio, one.repair)} on chunks stored {one.stored}: KL {loss.kl:.2e} "
        f"(± {table[one].error:.1e}), agreement {loss.agreement:.3f}, {loss.relative_time:.2f} of the time."
    )


def _point(
    checkpoint: Checkpoint, settings: CalibrationSettings, codec: str, best: Candidate, table: Table
) -> OperatingPoint:
    return OperatingPoint(
        model=checkpoint.fingerprint,
        dtype=cast(Dtype, str(checkpoint.dtype).removeprefix("torch.")),
        selector=best.selector,
        ratio=best.ratio,
        stored=best.stored,
        codec=codec,
        loss=table[best].loss,
        most_loss=settings.most_kl,
        least_agreement=settings.least_agreement,
        least=settings.least,
        repair=best.repair,
    )


def _written(point: OperatingPoint, out: Path) -> int:
    try:
        point.save(out)
    except OSError as error:
        print(f"hitpath engine calibrate: {out}: {error}; give another file with --out", file=sys.stderr)
        return 1
    print(f"wrote {out}: {_named(point.selector, point.ratio, point.repair)} on chunks stored {point.stored}")
    return 0


def _named(selector: str, ratio: float, repair: int) -> str:
    return f"{selector} {ratio:g}" + (f" with {repair} repaired beside each token drawn" if repair else "")
