"""The pictures of `docs/quality.md`, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from loadtest.quality.report import Row

mpl.use("agg")

_SIZE = (6.0, 4.5)
_DPI = 110


def reliability(path: Path, bins: Sequence[tuple[int, float, float]]) -> None:
    """Draw the share that serves over the judge's probability; bins are (pairs, mean probability, share)."""
    figure = Figure(_SIZE, _DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    upper.plot([mean for _, mean, _ in bins], [share for _, _, share in bins], marker="o", color="tab:blue")
    upper.set(ylabel="share that serves", xlim=(0, 1), ylim=(0, 1), title="Pair judge on held-out pairs")
    lower.bar([mean for _, mean, _ in bins], [pairs for pairs, _, _ in bins], width=0.05, color="0.6")
    lower.set(xlabel="probability that the judge gives", ylabel="pairs")
    figure.savefig(path)


def budgets(path: Path, lines: Mapping[float, Mapping[str, Sequence[float | None]]]) -> None:
    """Draw realised error over time, one panel a budget; a line's numbers are equal parts of the streams."""
    figure = Figure(_SIZE, _DPI, layout="constrained")
    panels = figure.subplots(2, (len(lines) + 1) // 2, sharex=True, squeeze=False).flat
    for panel, (budget, found) in zip(panels, lines.items(), strict=False):
        for name, colour in (("median", "tab:blue"), ("p95", "tab:orange")):
            values = [float("nan") if value is None else value for value in found[name]]
            parts = [(place + 1) / len(values) for place in range(len(values))]
            panel.plot(parts, values, color=colour, label=name)
        panel.axhline(budget, color="0.3", linewidth=1, linestyle="--", label="budget")
        panel.set(title=f"budget {budget:g}", ylim=(0, 2 * budget), xlim=(0, 1))
    figure.axes[0].legend()
    figure.supxlabel("part of the stream")
    figure.supylabel("wrong hits among hits so far")
    figure.savefig(path)


def chunks(path: Path, rows: Sequence[Row], task: str) -> None:
    """Draw divergence over measured time, both relative to the two ends; a line joins the ratios of one method."""
    figure = Figure((8.0, 5.0), _DPI, layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.turned and row.ratio < 1:
            kinds.setdefault(f"{row.name}, {row.stored}", []).append(row)
    for place, (label, members) in enumerate(kinds.items()):
        members.sort(key=lambda row: row.ratio)
        times, losses = [row.seconds for row in members], [row.quality[task].value for row in members]
        style = (
            {"linewidth": 2.5, "color": "black"}
            if label in ("sensitive, mean", "early, mean")
            else {"color": f"C{place % 10}"}
        )
        axes.plot(times, losses, marker="os^vD"[place // 10 % 5], markersize=4, label=label, **style)
    axes.set(yscale="log", xlabel="time / full prefill", ylabel="KL / none stored alone", title=task)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    figure.savefig(path)
