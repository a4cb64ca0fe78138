"""Makes the tables and pictures of `docs/quality.md`: `make report`, or `python -m loadtest.report [--only PART,...]`.

The judge is measured on the groups of the pair sets that its training never saw, through the gateway's own lookup path
at the default settings; budgets on the simulated streams that nothing was chosen on; chunk reuse on held-out prompts
with the bundled model.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gateway.settings import Settings
from loadtest import simulate_budget
from loadtest.data import DataError, data_dir
from loadtest.evaluate import Outcome, Pair, PairReport, ask_all, report_pairs
from loadtest.metrics import reliability
from loadtest.table import Bar
from loadtest.training.judge_data import NOISY, read_sets, split

DOCS = Path(__file__).parents[1] / "docs"
PAGE = "quality.md"
MEASURED = Path(__file__).parents[1] / "build" / "chunks"
"""Where measuring chunk reuse keeps what it has, prompt by prompt."""
STREAMS, LOOKUPS, FIRST = 200, 20_000, 10_000

BARS: Mapping[str, tuple[str, Bar]] = {
    "qqp": ("recall_at_1pct_false", Bar(">=", 0.30, "")),
    "mqp_medical": ("recall_at_1pct_false", Bar(">=", 0.45, "")),
    "covidq_pairs": ("recall_at_1pct_false", Bar(">=", 0.25, "")),
    "gsmplus": ("recall_at_1pct_false", Bar(">=", 0.55, "")),
    "paws_x_en": ("auc", Bar(">=", 0.80, "")),
    "bitext_entity_swap": ("negatives_served", Bar("<=", 0.02, "")),
    "medquad_neg": ("negatives_served", Bar("<=", 0.02, "")),
    "gsm_symbolic_p2": ("negatives_served", Bar("<=", 0.02, "")),
    "finance_adv": ("negatives_served", Bar("<=", 0.02, "")),
    "gsm8k_rephrase": ("positives_served", Bar(">=", 0.90, "")),
    "qqp, served": ("positives_served", Bar(">=", 0.25, "")),
}
"""By set what must be reached; of a set with two bars the second has a word behind a comma."""


def held_out() -> dict[str, list[Pair]]:
    """The pairs that training never saw, by set. Raises DataError."""
    _, held = split(read_sets(data_dir() / "pairs"))
    found: dict[str, list[Pair]] = {}
    for sample in held:
        found.setdefault(sample.set, []).append(Pair(sample.a, sample.b, int(sample.label)))
    return dict(sorted(found.items()))


def bars_table(reports: Mapping[str, PairReport]) -> str:
    """Every bar beside what was measured."""
    lines = ["| set | figure | measured | bar | holds |", "|---|---|---|---|---|"]
    for key, (figure, bar) in BARS.items():
        report = reports.get(key.partition(",")[0])
        value = None if report is None else getattr(report, figure)
        shown = ("–", "–") if value is None else (f"{value:.3f}", "yes" if bar.holds(value) else "**no**")
        lines.append(f"| {key} | {figure.replace('_', ' ')} | {shown[0]} | {str(bar).strip()} | {shown[1]} |")
    return "\n".join(lines)


def sets_table(reports: Mapping[str, PairReport]) -> str:
    """All figures of all sets."""
    lines = [
        "| set | positives | negatives | AUC | recall at 1 % | at 5 % | served + | served – |",
        "|---|" + "---|" * 7,
    ]
    for name, report in reports.items():
        figures = [report.auc, report.recall_at_1pct_false, report.recall_at_5pct_false]
        figures += [report.positives_served, report.negatives_served]
        cells = ["–" if figure is None else f"{figure:.3f}" for figure in figures]
        lines.append(f"| {name} | {report.positives} | {report.negatives} | {' | '.join(cells)} |")
    return "\n".join(lines)


def placed(page: str, name: str, table: str) -> str:
    """Put a table between its marks in a page. Raises ValueError when the page has none."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    if not marks.search(page):
        raise ValueError(f"there is no <!-- {name} --> … <!-- end -->")
    return marks.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page)


def _judge(folder: Path) -> dict[str, str]:
    from loadtest import plots

    sets = held_out()
    found = dict(zip(sets, asyncio.run(ask_all(list(sets.values()), Settings())), strict=True))
    reports = {name: report_pairs(name, outcomes) for name, outcomes in found.items()}
    plots.reliability(folder / "reliability.png", _bins(found))
    return {"bars": bars_table(reports), "sets": sets_table(reports)}


def _bins(found: Mapping[str, Sequence[Outcome]]) -> list[tuple[int, float, float]]:
    """Of the pairs that reach the pair model: neither equal but for typing, nor refused by a guard."""
    left = [item for name, items in found.items() if name not in NOISY for item in items if 0 < item.score < 1]
    return reliability(np.array([item.score for item in left]), np.array([float(item.label) for item in left]))


def _budgets(folder: Path) -> dict[str, str]:
    from loadtest import plots

    rows, lines = [], {}
    for budget in simulate_budget.BUDGETS:
        outcomes = simulate_budget.simulate(budget, STREAMS, LOOKUPS, FIRST)
        rows.append(simulate_budget.summary(budget, LOOKUPS, outcomes))
        lines[budget] = simulate_budget.over_time(outcomes)
    plots.budgets(folder / "budgets.png", lines)
    return {"budgets": simulate_budget.render(rows)}


def _chunks(folder: Path) -> dict[str, str]:
    # Needs torch, as the others do not. What was measured already, by `python -m loadtest.quality.chunks`, is taken up.
    from loadtest.quality import chunks
    from loadtest.quality.report import checks, checks_table, table

    rows = chunks.run(chunks.Plan(), MEASURED)
    chunks.draw(rows, folder)
    return {"chunks": table(rows), "chunk checks": checks_table(checks(rows))}


PARTS: Mapping[str, Callable[[Path], dict[str, str]]] = {"judge": _judge, "budgets": _budgets, "chunks": _chunks}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, and write into the page; 1 when the measurement data is absent."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.report", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    path = options.docs / PAGE
    try:
        for part in options.only:
            tables = PARTS[part](options.docs)
            page = path.read_text("utf-8")
            for name, table in tables.items():
                page = placed(page, name, table)
            path.write_text(page, "utf-8")
    except DataError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
