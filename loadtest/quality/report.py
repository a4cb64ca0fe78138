"""The tables of `loadtest.quality.chunks`, and what must hold in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from loadtest.quality.statistics import Relative

MOST_TIME = 0.40
"""Of full prefill's time, for the bars of our own rules."""
OURS = ("sensitive", "early")


@dataclass(frozen=True, slots=True)
class Row:
    """One method: divergence per task relative to chunks as they are, and costs relative to full prefill."""

    name: str
    stored: str
    ratio: float
    turned: bool
    quality: dict[str, Relative]
    computed: float
    """Share of the prompt's tokens computed, mean over layers."""
    operations: float
    seconds: float
    """Measured, at the length of the tasks' prompts."""
    seconds_long: float
    """Measured with 6 chunks of 512 tokens."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, or is to be reached."""

    claim: str
    measured: str
    holds: bool


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    tasks = list(rows[0].quality)
    lines = [
        f"| method | stored | K turned | ratio | {' | '.join(tasks)} | tokens | operations | time | time, 6 × 512 |",
        "|---|---|---|---|" + "---|" * (len(tasks) + 4),
    ]
    for row in rows:
        quality = " | ".join(_written(row.quality.get(task)) for task in tasks)
        costs = " | ".join(f"{cost:.2f}" for cost in (row.computed, row.operations, row.seconds, row.seconds_long))
        turned = "yes" if row.turned else "no"
        lines.append(f"| {row.name} | {row.stored} | {turned} | {row.ratio:.2f} | {quality} | {costs} |")
    return "\n".join(lines)


def checks(rows: Sequence[Row], task: str = "quote") -> list[Check]:
    """What must hold of published rules on one task, and what our own is to reach."""

    def at(name: str, ratio: float, *, turned: bool = True) -> float:
        return _found(rows, name, ratio, turned=turned).quality[task].value

    unturned, chance = at("none", 0.0, turned=False), at("random", 0.15)
    blend, epic = at("cacheblend K+V", 0.15), at("epic", 0.15)
    return [
        Check("K not turned: at least 2 × none", f"{unturned:.2f}", unturned >= 2),
        Check("random 15 % > CacheBlend 15 %", f"{chance:.3f} > {blend:.3f}", chance > blend),
        Check("random 15 % > EPIC 15 %", f"{chance:.3f} > {epic:.3f}", chance > epic),
        Check("CacheBlend 15 %: at most .65 × none", f"{blend:.3f}", blend <= 0.65),
        *(_falls(rows, name, stored, task) for name, stored in _falling(rows)),
        *_reached(rows),
    ]


def checks_table(found: Iterable[Check]) -> str:
    """Markdown."""
    lines = ["| must hold | measured | holds |", "|---|---|---|"]
    lines += [f"| {check.claim} | {check.measured} | {'yes' if check.holds else '**no**'} |" for check in found]
    return "\n".join(lines)


def save(rows: Sequence[Row], facts: dict[str, Any], out: Path) -> None:
    """Write `chunks.json` and `chunks.md`."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {"facts": facts, "rows": [asdict(row) for row in rows]}
    (out / "chunks.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "chunks.md").write_text(f"{table(rows)}\n\n{checks_table(checks(rows))}\n")


def _found(rows: Iterable[Row], name: str, ratio: float, *, stored: str = "alone", turned: bool = True) -> Row:
    wanted = (name, stored, ratio, turned)
    return next(row for row in rows if (row.name, row.stored, row.ratio, row.turned) == wanted)


def _falling(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every rule that repairs a share, however chunks are stored; chance promises nothing."""
    kinds = ((row.name, row.stored) for row in rows if row.turned and 0 < row.ratio < 1)
    return [kind for kind in dict.fromkeys(kinds) if kind[0] not in ("random", "cachecraft")]


def _falls(rows: Sequence[Row], name: str, stored: str, task: str) -> Check:
    members = [row for row in rows if (row.name, row.stored, row.turned) == (name, stored, True)]
    values = [row.quality[task].value for row in sorted(members, key=lambda row: row.ratio)]
    falls = all(more <= less for less, more in pairwise(values))
    return Check(f"KL falls with the ratio: {name}, {stored}", " > ".join(f"{value:.3f}" for value in values), falls)


def _reached(rows: Sequence[Row]) -> list[Check]:
    """The best point of our own rules within the time, by the worse of both bars."""
    bars = {"quote": 0.12, "facts": 0.40}
    ours = [row for row in rows if row.name in OURS and row.turned and row.seconds <= MOST_TIME]
    if not ours or any(task not in ours[0].quality for task in bars):
        return []
    chosen = min(ours, key=lambda row: max(row.quality[task].value / bar for task, bar in bars.items()))
    where = f"{chosen.name} {chosen.ratio:.2f}, {chosen.stored}, at {chosen.seconds:.2f} of the time"
    return [
        Check(
            f"ours on {task}: at most {bar:.2f} at {MOST_TIME:.2f} of full prefill's time",
            f"{chosen.quality[task].value:.3f} ({where})",
            chosen.quality[task].value <= bar,
        )
        for task, bar in bars.items()
    ]


def _written(value: Relative | None) -> str:
    if value is None:
        return "–"
    if value.value < 1e-4:
        return "0"
    return f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"
