"""The tables and the plot of `loadtest.quality.chunks`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from loadtest.quality.statistics import Relative

_WIDTH, _HEIGHT = 560, 400


@dataclass(frozen=True, slots=True)
class Row:
    """One method: divergence per task relative to chunks as they are, and costs relative to full prefill."""

    name: str
    stored: str
    ratio: float
    quality: dict[str, Relative]
    computed: float
    """Share of the prompt's tokens computed, mean over layers."""
    operations: float
    seconds: float
    """Measured, at the length of the tasks' prompts."""
    seconds_long: float
    """Measured with 6 chunks of 512 tokens."""


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    tasks = list(rows[0].quality)
    lines = [
        f"| method | stored | ratio | {' | '.join(tasks)} | tokens | operations | time | time, 6 × 512 |",
        "|---|---|---|" + "---|" * (len(tasks) + 4),
    ]
    for row in rows:
        quality = " | ".join(_written(row.quality[task]) for task in tasks)
        costs = " | ".join(f"{cost:.2f}" for cost in (row.computed, row.operations, row.seconds, row.seconds_long))
        lines.append(f"| {row.name} | {row.stored} | {row.ratio:.2f} | {quality} | {costs} |")
    return "\n".join(lines) + "\n"


def save(rows: Sequence[Row], facts: dict[str, Any], out: Path) -> None:
    """Write `chunks.json`, `chunks.md` and, where there is something to see, `chunks.svg`."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {"facts": facts, "rows": [asdict(row) for row in rows]}
    (out / "chunks.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "chunks.md").write_text(table(rows))
    for task in rows[0].quality:
        (out / f"chunks-{task}.svg").write_text(plot(rows, task))


def plot(rows: Sequence[Row], task: str) -> str:
    """An SVG of divergence over measured time, both relative; methods of one kind are joined by a line."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if "not turned" not in row.name and row.ratio < 1:
            kinds.setdefault(f"{row.name}, {row.stored}", []).append(row)
    low = min(row.quality[task].value for row in rows if row.ratio < 1)
    decades = math.ceil(-math.log10(max(low, 1e-6)))
    parts = [_grid(decades, task)]
    for place, (label, members) in enumerate(kinds.items()):
        members.sort(key=lambda row: row.seconds)
        points = [_point(row.seconds, row.quality[task].value, decades) for row in members]
        colour = f"hsl({place * 137 % 360} 65% 42%)"
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        parts += (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
        parts.append(f'<text x="{_WIDTH + 70}" y="{30 + 16 * place}" fill="{colour}">{escape(label)}</text>')
    size = f'width="{_WIDTH + 290}" height="{_HEIGHT + 70}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _point(seconds: float, value: float, decades: int) -> tuple[float, float]:
    height = min(1.0, max(0.0, 1 + math.log10(max(value, 1e-9)) / decades))
    return 60 + min(seconds, 1.2) / 1.2 * _WIDTH, 20 + (1 - height) * _HEIGHT


def _grid(decades: int, task: str) -> str:
    lines = ['<rect width="100%" height="100%" fill="white"/>']
    for power in range(decades + 1):
        _, y = _point(0, 10.0**-power, decades)
        lines.append(
            f'<path d="M60 {y:.1f}h{_WIDTH}" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">{10.0**-power:g}</text>'
        )
    for tenth in range(0, 13, 2):
        x, _ = _point(tenth / 10, 1, decades)
        lines.append(f'<path d="M{x:.1f} 20v{_HEIGHT}" stroke="#eee"/>')
        lines.append(f'<text x="{x - 8:.1f}" y="{_HEIGHT + 36}">{tenth / 10}</text>')
    lines.append(f'<text x="60" y="{_HEIGHT + 56}">time / full prefill; upwards: KL / none, {task}</text>')
    return "\n".join(lines)


def _written(value: Relative) -> str:
    if value.value < 1e-4:
        return "0"
    return f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"
