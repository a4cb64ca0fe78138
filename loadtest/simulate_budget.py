"""Is the error budget kept? Streams of look-ups whose truth is known, through `policies.budget`.

python -m loadtest.simulate_budget [--start earned|judge] [--asked] [--streams N] [--lookups N] [--budget B]...
                                   [--first SEED] [--json]

A stream is one category's look-ups. Three in five have a candidate; its truth is drawn from a mixture (repeats that
are nearly always right, a grey zone, other questions), and the judge's word for it is distorted: honest, too sure of
itself or too timid, noisy, and in half the streams blind to a kind that looks like a repeat and is wrong two
times in five. In seven streams of ten the mixture changes somewhere in the middle, and with it, in half of these, how
often the blind kind comes. The defaults of `BudgetRules` were chosen on the streams 0 to 99, guard, rungs and what the
credit is on 20 000 to 20 999, so others are reported. The rules are the gateway's at its default settings but for the
start.

`--start earned` serves nothing by meaning before labels have shown that it may, and then from the laxest point on that
the test allows. With `--asked` it serves from no laxer point than the calibrated judge's, as the gateway does: the one
that keeps the budget on 4000 labelled candidates of another mixture. `--start judge`, the gateway's default, believes
the judge at that point from the first look-up on, and asks for no laxer one either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gateway.settings import Budgets, Cache
from gateway.trusting import trust_rules
from policies.budget import NEVER, RUNGS, BudgetRules, CategoryBudget

BUDGETS = (0.005, 0.01, 0.02, 0.05)
POINTS = 100
"""Times a stream at which its error is noted."""
_CANDIDATES = 0.6
REFERENCE = 4000
"""Labelled candidates on which a judge is calibrated before it sees traffic."""
_REFERENCE_BLIND = 0.05
"""Share of the blind kind among them: sets of pairs have more hard negatives than traffic has."""
_BLIND_WRONG = 0.5
"""Logit of the probability that the blind kind is right."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One category's look-ups."""

    p: NDArray[np.float64]
    """The judge's probability, shape [lookups]; 0 where there is no candidate."""
    wrong: NDArray[np.bool_]
    """Whether the candidate's answer is wrong, shape [lookups]."""
    shift: int
    """The look-up at which the mixture changes; the number of look-ups if it never does."""
    judge: str
    """honest, sure or timid."""
    reference: tuple[NDArray[np.float64], NDArray[np.bool_]]
    """What the judge says of labelled candidates of another mixture, and whether they are wrong."""

    def point(self, budget: float) -> float:
        """The laxest point that keeps a budget on the labelled candidates; NEVER where none does."""
        p, wrong = self.reference
        order = np.argsort(-p, kind="stable")
        good = np.flatnonzero(np.cumsum(wrong[order]) <= budget * np.arange(1, len(p) + 1))
        return float(p[order][good[-1]]) if len(good) else NEVER


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the controller made of a stream."""

    hits: int
    wrong: int
    checked: int
    exhaustions: int
    oracle: int
    """Hits of the best fixed point, chosen with all truths known, that keeps the budget on this stream."""
    believed_hits: int
    believed_wrong: int
    """The same, had the judge's claims been believed."""
    shifted: bool
    hits_so_far: tuple[int, ...]
    wrong_so_far: tuple[int, ...]
    """After each of POINTS equal parts of the stream."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All streams of one budget; shares between 0 and 1."""

    budget: float
    streams: int
    lookups: int
    kept: float
    """Streams whose realised error is at most the budget."""
    kept_shifted: float | None
    kept_of_serving: float | None
    """The same among the streams that served anything at all."""
    serving: float
    error: float
    """Wrong hits among all hits of all streams."""
    hit_share: float
    """Hits among look-ups."""
    of_oracle: float
    checked: float
    """Checked hits among hits."""
    exhaustions: float
    """A stream."""
    believed_kept: float
    believed_hit_share: float


def stream(seed: int, lookups: int) -> Stream:
    """Draw a stream."""
    draw = np.random.default_rng(seed)
    judge = str(draw.choice(["honest", "sure", "timid"]))
    repeats = draw.uniform(5.5, 8.0)
    blind = 0.0 if draw.random() < 0.5 else draw.uniform(0.005, 0.03)
    blind_after = blind if draw.random() < 0.5 else draw.uniform(0.02, 0.15)
    shift = int(lookups * draw.uniform(0.3, 0.7)) if draw.random() < 0.7 else lookups
    before = _mixture(draw, blind)
    after = _mixture(draw, blind_after)
    kinds = np.where(np.arange(lookups) < shift, draw.choice(4, lookups, p=before), draw.choice(4, lookups, p=after))
    claimed, wrong = _judged(draw, kinds, repeats, judge)
    near = draw.random(lookups) < _CANDIDATES
    # The pairs a judge is calibrated on are another mixture of the same kinds, the hard ones among them.
    reference = draw.choice(4, REFERENCE, p=_mixture(draw, _REFERENCE_BLIND))
    return Stream(np.where(near, claimed, 0.0), wrong, shift, judge, _judged(draw, reference, repeats, judge))


def _judged(
    draw: np.random.Generator, kinds: NDArray[np.int64], repeats: float, judge: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What the judge says of candidates of these kinds, and whether their answers are wrong."""
    size = len(kinds)
    means, spreads = np.array([repeats, 2.0, -3.0, _BLIND_WRONG]), np.array([1.2, 2.0, 2.0, 1.0])
    truth = draw.normal(means[kinds], spreads[kinds])
    wrong = draw.random(size) >= _probability(truth)
    seen = np.where(kinds == 3, draw.normal(repeats - 1.0, 1.2, size), truth)
    slope, lift = {"honest": (1.0, 0.0), "sure": (1.4, 1.0), "timid": (0.7, -0.5)}[judge]
    return _probability(slope * seen + lift + draw.normal(0.0, 0.3, size)), wrong


def _mixture(draw: np.random.Generator, blind: float) -> NDArray[np.float64]:
    return np.append(draw.dirichlet([5.0, 3.0, 2.0]) * (1.0 - blind), blind)


def _probability(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def run(given: Stream, rules: BudgetRules, seed: int, *, believe: bool = False, asked: bool = False) -> Outcome:
    """Send a stream through a controller; labels come at once and are true. `asked`: ask for no laxer point than the
    calibrated judge's; `believe`: begin there, and ask for no laxer one either.
    """
    judged = given.point(rules.budget)
    wanted = judged if believe or asked else 0.0
    controller = CategoryBudget(rules, judged if believe else NEVER)
    draws = np.random.default_rng([seed, 1]).random(len(given.p)).tolist()
    probabilities, wrongs = given.p.tolist(), given.wrong.tolist()
    hits = wrong = checked = 0
    hits_so_far, wrong_so_far = [], []
    part = max(1, len(probabilities) // POINTS)
    for place, p in enumerate(probabilities):
        if p > 0.0:
            decision = controller.decide(p, draws[place], wanted)
            if decision.serve:
                hits += 1
                wrong += wrongs[place]
                checked += decision.check
            if decision.check:
                controller.learn(decision, float(wrongs[place]))
        if (place + 1) % part == 0:
            hits_so_far.append(hits)
            wrong_so_far.append(wrong)
    believed = _believed(given, rules.budget)
    return Outcome(
        hits=hits,
        wrong=wrong,
        checked=checked,
        exhaustions=controller.figures().exhaustions,
        oracle=_oracle(given, rules.budget),
        believed_hits=believed[0],
        believed_wrong=believed[1],
        shifted=given.shift < len(given.p),
        hits_so_far=tuple(hits_so_far),
        wrong_so_far=tuple(wrong_so_far),
    )


def _strictest_first(given: Stream) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    order = np.argsort(-given.p, kind="stable")
    order = order[given.p[order] >= RUNGS[0]]
    return given.p[order], given.wrong[order]


def _oracle(given: Stream, budget: float) -> int:
    _, wrong = _strictest_first(given)
    counts = np.arange(1, len(wrong) + 1)
    good = np.flatnonzero(np.cumsum(wrong) <= budget * counts)
    return int(good[-1]) + 1 if len(good) else 0


def _believed(given: Stream, budget: float) -> tuple[int, int]:
    """Hits and wrong hits from the laxest point on at which the judge claims to keep the budget."""
    p, wrong = _strictest_first(given)
    good = np.flatnonzero(np.cumsum(1.0 - p) <= budget * np.arange(1, len(p) + 1))
    hits = int(good[-1]) + 1 if len(good) else 0
    return hits, int(wrong[:hits].sum())


def simulate(
    budget: float, streams: int, lookups: int, first: int, *, believe: bool = False, asked: bool = False
) -> list[Outcome]:
    """Run the streams from the seed `first` on under one budget; `believe` and `asked` are those of `run`."""
    rules = trust_rules(Cache(budgets=Budgets(start="judge" if believe else "earned"))).budget(budget)
    seeds = range(first, first + streams)
    return [run(stream(seed, lookups), rules, seed, believe=believe, asked=asked) for seed in seeds]


def _kept(outcomes: Sequence[Outcome], budget: float) -> float | None:
    return float(np.mean([o.wrong <= budget * o.hits for o in outcomes])) if outcomes else None


def summary(budget: float, lookups: int, outcomes: Sequence[Outcome]) -> Summary:
    """Add up the streams of one budget."""
    hits = sum(o.hits for o in outcomes)
    total = lookups * len(outcomes)
    return Summary(
        budget=budget,
        streams=len(outcomes),
        lookups=lookups,
        kept=_kept(outcomes, budget) or 0.0,
        kept_shifted=_kept([o for o in outcomes if o.shifted], budget),
        kept_of_serving=_kept([o for o in outcomes if o.hits], budget),
        serving=float(np.mean([o.hits > 0 for o in outcomes])),
        error=sum(o.wrong for o in outcomes) / max(1, hits),
        hit_share=hits / total,
        of_oracle=hits / max(1, sum(o.oracle for o in outcomes)),
        checked=sum(o.checked for o in outcomes) / max(1, hits),
        exhaustions=float(np.mean([o.exhaustions for o in outcomes])),
        believed_kept=float(np.mean([o.believed_wrong <= budget * o.believed_hits for o in outcomes])),
        believed_hit_share=sum(o.believed_hits for o in outcomes) / total,
    )


def over_time(outcomes: Sequence[Outcome]) -> dict[str, list[float | None]]:
    """The realised error up to each part of the streams, for a plot: median and 95th percentile of those that serve.

    Lists of POINTS numbers; None where no stream has served yet.
    """
    hits = np.array([o.hits_so_far for o in outcomes], float)
    wrong = np.array([o.wrong_so_far for o in outcomes], float)
    found: dict[str, list[float | None]] = {"median": [], "p95": [], "serving": []}
    for part in range(hits.shape[1]):
        serving = hits[:, part] > 0
        errors = wrong[serving, part] / hits[serving, part]
        found["serving"].append(float(serving.mean()))
        found["median"].append(float(np.median(errors)) if len(errors) else None)
        found["p95"].append(float(np.quantile(errors, 0.95)) if len(errors) else None)
    return found


_TITLES = ("budget", "kept", "kept, shifted", "kept, serving", "serving", "error", "hits", "of oracle", "checked")


def render(rows: Sequence[Summary]) -> str:
    """The summaries as a Markdown table."""
    lines = [" | ".join((*_TITLES, "exhausted", "believed: kept", "believed: hits"))]
    lines.append(" | ".join(["---"] * (len(_TITLES) + 3)))
    for row in rows:
        shares = (row.kept, row.kept_shifted, row.kept_of_serving, row.serving)
        shown = ["–" if value is None else f"{value:.3f}" for value in shares]
        shown += [f"{row.error:.4f}", f"{row.hit_share:.3f}", f"{row.of_oracle:.2f}", f"{row.checked:.2f}"]
        shown += [f"{row.exhaustions:.2f}", f"{row.believed_kept:.2f}", f"{row.believed_hit_share:.3f}"]
        lines.append(" | ".join([f"{row.budget:g}", *shown]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.simulate_budget", description=__doc__)
    parser.add_argument("--start", choices=("earned", "judge"), default="earned")
    parser.add_argument("--asked", action="store_true", help="ask for no laxer point than the judge's own")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--lookups", type=int, default=20_000)
    parser.add_argument("--budget", type=float, action="append")
    parser.add_argument("--first", type=int, default=10_000, metavar="SEED")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.streams < 1 or options.lookups < POINTS:
        parser.error(f"at least 1 stream and {POINTS} look-ups are needed")
    rows: list[Summary] = []
    plots: dict[str, Any] = {}
    for budget in options.budget or BUDGETS:
        believe = options.start == "judge"
        outcomes = simulate(
            budget, options.streams, options.lookups, options.first, believe=believe, asked=options.asked
        )
        rows.append(summary(budget, options.lookups, outcomes))
        plots[f"{budget:g}"] = over_time(outcomes)
    if options.json:
        document = {"budgets": [asdict(row) for row in rows], "over_time": plots}
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        sys.stdout.write(render(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
