"""One table of figures: each beside its ceiling, its bar, and whether it holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach."""

    relation: str
    """`>=` or `<=`."""
    limit: float
    unit: str

    def holds(self, value: float) -> bool:
        """Say whether the value reaches it."""
        return value >= self.limit if self.relation == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {_number(self.limit)} {self.unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: what was measured, its ceiling in the same run, and what of both is judged."""

    name: str
    measured: float
    unit: str
    ceiling: float | None = None
    ceiling_name: str = ""
    judged: float | None = None
    """The median of all rounds' ratios or differences; None where nothing is compared."""
    judged_unit: str = ""
    low: float | None = None
    high: float | None = None
    """Least and largest of the rounds."""
    bar: Bar | None = None
    """In the figure's own unit it speaks of the figure, else of what is judged."""

    @property
    def holds(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        if self.bar is None:
            return None
        if self.judged is None or self.bar.unit == self.unit:
            return self.bar.holds(self.measured)
        return self.bar.holds(self.judged)

    def document(self) -> dict[str, Any]:
        """The row as JSON."""
        bar = None if self.bar is None else str(self.bar)
        return asdict(self) | {"bar": bar, "holds": self.holds}


def absolute(name: str, value: float, unit: str, bar: Bar | None = None) -> Row:
    """A figure judged by itself."""
    return Row(name, value, unit, bar=bar)


def ratio(
    name: str, unit: str, measured: Sequence[float], ceiling: Sequence[float], ceiling_name: str, bar: Bar | None = None
) -> Row:
    """A figure judged by its ratio to its ceiling, round by round."""
    judged = [ours / theirs for ours, theirs in zip(measured, ceiling, strict=True)]
    return _compared(name, unit, measured, ceiling, ceiling_name, judged, "x", bar)


def difference(
    name: str, unit: str, measured: Sequence[float], ceiling: Sequence[float], ceiling_name: str, bar: Bar | None = None
) -> Row:
    """A figure judged by what it adds to its ceiling, round by round."""
    judged = [ours - theirs for ours, theirs in zip(measured, ceiling, strict=True)]
    return _compared(name, unit, measured, ceiling, ceiling_name, judged, f"{unit} more", bar)


def _compared(
    name: str,
    unit: str,
    measured: Sequence[float],
    ceiling: Sequence[float],
    ceiling_name: str,
    judged: Sequence[float],
    judged_unit: str,
    bar: Bar | None,
) -> Row:
    return Row(
        name=name,
        measured=statistics.median(measured),
        unit=unit,
        ceiling=statistics.median(ceiling),
        ceiling_name=ceiling_name,
        judged=statistics.median(judged),
        judged_unit=judged_unit,
        low=min(judged),
        high=max(judged),
        bar=bar,
    )


_TITLES = ("what", "measured", "ceiling in the same run", "judged (min–max of rounds)", "bar", "holds")


def render(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table with aligned columns."""
    lines = [_TITLES, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_TITLES))]
    rule = tuple("-" * width for width in widths)
    shown = [lines[0], rule, *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in shown)


def _cells(row: Row) -> tuple[str, ...]:
    ceiling = "" if row.ceiling is None else f"{row.ceiling_name}: {_number(row.ceiling)} {row.unit}"
    judged = "" if row.judged is None else f"{_number(row.judged)} {row.judged_unit}"
    if row.low is not None and row.high is not None:
        judged += f" ({_number(row.low)}–{_number(row.high)})"
    holds = {None: "", True: "yes", False: "NO"}[row.holds]
    return (
        row.name,
        f"{_number(row.measured)} {row.unit}",
        ceiling,
        judged,
        "" if row.bar is None else str(row.bar),
        holds,
    )


def _number(value: float) -> str:
    """Three figures, thousands apart."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.995 else f"{value:.3f}"
