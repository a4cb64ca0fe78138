"""From the pair model's logits on held-out pairs to a head, acceptance points, and the model card."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gateway.embedding.local import MODEL_NAME
from gateway.embedding.minilm import MiniLM
from gateway.judge.load import GRAPH, HEAD
from gateway.judge.model import PairModel
from loadtest.metrics import auc, recall_at, reliability, share
from loadtest.training.judge_data import HELD_OUT, Sample
from policies import guards
from policies.classifier import CategoryHead
from policies.facts import facts
from policies.pairhead import PairHead, Points, Weights

Figures = NDArray[np.float64]

FOLDS = 5
PRIOR = 50.0
"""Pairs' worth of belief that a category is like the others."""
BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LOOSEST = 0.5
"""No point is below this: what more probably does not serve is not served."""
MISLABELLED = {"qqp": 0.4}
"""Share of a set's likeliest pairs of label 0 that do serve: of the first 30 some 14 do, read one by one."""
ENOUGH = 250
"""Pairs of a category from which on it has acceptance points of its own."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A held-out pair and all that is known of it."""

    sample: Sample
    logit: float
    cosine: float
    category: str
    """As the gateway's classifier says."""
    refused: bool
    """By a guard, or too long."""


def judged(samples: Sequence[Sample], model: PairModel, embedder: MiniLM) -> list[Judged]:
    """Ask the graph, the embedder and the guards about every pair."""
    head = CategoryHead.load()
    found = []
    for start in range(0, len(samples), 64):
        part = samples[start : start + 64]
        first = embedder.encode([sample.a for sample in part])
        second = embedder.encode([sample.b for sample in part])
        for sample, one, other in zip(part, first, second, strict=True):
            (logit,) = model.logits(sample.b, [sample.a])
            refused = logit is None or guards.conflict(facts(sample.b), facts(sample.a)) is not None
            cosine = float(one.vector @ other.vector)
            category, _ = head.classify(other.vector)
            found.append(Judged(sample, -20.0 if logit is None else logit, cosine, category, refused))
    return found


def report(found: Sequence[Judged], learnt: Sequence[Sample], minutes: float) -> tuple[dict[str, Any], str]:
    """The head's document and the card."""
    unseen = crossed(found)
    head = fitted(found)
    head = replace(head, **points_of(found, unseen))
    document = {
        "minutes": round(minutes),
        "with_cosine": asdict(head.with_cosine),
        "without_cosine": asdict(head.without_cosine),
        "categories": dict(head.categories),
        "points": head.points,
        "category_points": head.category_points,
    }
    return document, card(found, unseen, head, learnt, minutes)


def fitted(found: Sequence[Judged]) -> PairHead:
    """Fit both regressions, and what categories differ by, to the pairs that guards leave over."""
    left = [item for item in found if not item.refused]
    labels = np.array([item.sample.label for item in left])
    weight = _weights([item.sample.set for item in left])
    logit = np.array([item.logit for item in left])
    cosine = np.array([item.cosine for item in left])
    ones = np.ones_like(logit)
    both = _regression(np.stack([logit, cosine, ones], 1), labels, weight)
    alone = _regression(np.stack([logit, ones], 1), labels, weight)
    total = np.stack([logit, cosine, ones], 1) @ both
    categories = {
        name: _offset(total[rows], labels[rows], weight[rows])
        for name in sorted({item.category for item in left})
        for rows in [np.array([item.category == name for item in left])]
    }
    return PairHead(Weights(*both.tolist()), Weights(float(alone[0]), 0.0, float(alone[1])), categories, (), {})


def _weights(sets: Sequence[str]) -> Figures:
    """A set counts with the root of its size: neither the largest nor the smallest decides."""
    counts = Counter(sets)
    weights = np.array([counts[name] ** -0.5 for name in sets])
    return np.asarray(weights * len(sets) / weights.sum())


def _regression(inputs: Figures, labels: Figures, weight: Figures) -> Figures:
    """Logistic regression by Newton's method; the last column is the intercept."""
    found = np.zeros(inputs.shape[1])
    ridge = np.eye(len(found)) * 1e-3
    ridge[-1, -1] = 0
    for _ in range(50):
        share = 1 / (1 + np.exp(-inputs @ found))
        slope = inputs.T @ (weight * (share - labels)) + ridge @ found
        curve = (inputs * (weight * share * (1 - share))[:, None]).T @ inputs + ridge
        step = np.linalg.solve(curve, slope)
        found = found - step
        if np.abs(step).max() < 1e-8:
            break
    return found


def _offset(total: Figures, labels: Figures, weight: Figures) -> float:
    """What to add to a category's logits; a quarter is the most that one pair can tell."""
    offset = 0.0
    for _ in range(50):
        share = 1 / (1 + np.exp(-(total + offset)))
        slope = float((weight * (share - labels)).sum()) + PRIOR / 4 * offset
        step = slope / (float((weight * share * (1 - share)).sum()) + PRIOR / 4)
        offset -= step
        if abs(step) < 1e-8:
            break
    return offset


def crossed(found: Sequence[Judged]) -> Figures:
    """Probability of every pair by a head that was fitted without its fold; 0 where a guard refuses."""
    folds = np.array([_fold(item.sample.a) for item in found])
    shares = np.zeros(len(found))
    for fold in range(FOLDS):
        known = [item for item, own in zip(found, folds, strict=True) if own != fold]
        head = fitted(known)
        for place in np.flatnonzero(folds == fold).tolist():
            item = found[place]
            if not item.refused:
                shares[place] = head.probability(item.logit, item.cosine, item.category)
    return shares


def _fold(text: str) -> int:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=2).digest()[0] % FOLDS


def points_of(found: Sequence[Judged], shares: Figures) -> dict[str, Any]:
    """The acceptance points: of all pairs, and of every category that has enough of them."""
    weight = _weights([item.sample.set for item in found])
    by_category = {}
    for name, count in Counter(item.category for item in found).items():
        if count >= ENOUGH:
            rows = [place for place, item in enumerate(found) if item.category == name]
            # A set's few pairs that strayed into a category weigh there what they weigh among all.
            by_category[name] = points([found[place] for place in rows], shares[rows], weight[rows])
    return {"points": points(found, shares, weight), "category_points": by_category}


def points(found: Sequence[Judged], shares: Figures, weight: Figures) -> Points:
    """For every budget the lowest probability from which on the pairs that are accepted keep it.

    The reference traffic is half repetitions that differ only in how they are typed, whose answers are right by
    construction, and half the held-out pairs; each set counts alike. It is a start: the gateway learns the point of its
    own traffic from answers that it checks. Of sets whose labels are known to be wrong so often, only the rest counts.
    """
    wrong = np.array([(item.sample.label < 0.5) * (1 - MISLABELLED.get(item.sample.set, 0.0)) for item in found])
    order = np.argsort(-shares)
    errors, accepted = np.cumsum((weight * wrong)[order]), np.cumsum(weight[order])
    share = errors / (accepted + weight.sum() / 2)
    steps = shares[order]
    made = []
    for budget in BUDGETS:
        within = np.flatnonzero((share <= budget) & (steps >= LOOSEST))
        made.append((budget, float(steps[within[-1]]) if len(within) else 1.0))
    return tuple(made)


def card(found: Sequence[Judged], shares: Figures, head: PairHead, learnt: Sequence[Sample], minutes: float) -> str:
    """The model card; `shares` are the cross-fitted probabilities."""
    counts = Counter(sample.set for sample in learnt)
    served = [share >= head.point(0.01, item.category) for item, share in zip(found, shares.tolist(), strict=True)]
    lines = [
        "# Pair model",
        "",
        "Told two questions, gives the probability that one answer serves both. It judges what similarity proposes and",
        "the guards (`policies/guards.py`) do not refuse.",
        "",
        f"- Shape: MiniLM ({MODEL_NAME}, six layers of 384) over both questions at once, every token marked with",
        "  whether the other question has it, int8 with static ranges. The table of words is the embedder's.",
        "- Head: logistic regression over its logit and the embeddings' cosine, with an offset by category.",
        f"- Training: `python -m loadtest.training.judge`, {minutes:.0f} CPU minutes for six runs",
        "  and four short ones that go on from their mean; two parts of that mean, one of theirs. No text ships.",
        "- Trained on: " + ", ".join(f"{name} {counts[name]}" for name in sorted(counts)) + ",",
        "  and pairs made from their texts by the rules of `loadtest/training/judge_edits.py`.",
        f"- Held out: {HELD_OUT} % of the groups of every set (groups: pairs linked by equal texts), never trained on.",
        "  The head is fitted on them; the figures below are of heads that did not see the pair's fifth.",
        "- English only, as its embedder. Labels of qqp are noisy; below 1 % false hits its figures mean little.",
        "",
        "| set | pairs | cosine: AUC, recall at 1 % false | judge: AUC, recall at 1 %, at 5 % | served: +, - |",
        "|---|---|---|---|---|",
    ]
    lines += [_line(name, found, shares, served) for name in sorted({item.sample.set for item in found})]
    lines += [
        "",
        f"Acceptance point of error budget 0.01: {head.point(0.01, ''):.3f}; "
        + ", ".join(f"{name} {head.point(0.01, name):.3f}" for name in sorted(head.category_points))
        + ".",
        "Reliability on the held-out pairs that reach the model:",
    ]
    lines += ["", "| pairs | probability | serve |", "|---|---|---|"]
    rows = [place for place, item in enumerate(found) if not item.refused]
    labels = np.array([found[place].sample.label for place in rows])
    lines += [f"| {count} | {mean:.3f} | {served:.3f} |" for count, mean, served in reliability(shares[rows], labels)]
    return "\n".join([*lines, ""])


def _line(name: str, found: Sequence[Judged], shares: Figures, served: Sequence[bool]) -> str:
    rows = [place for place, item in enumerate(found) if item.sample.set == name]
    wanted, others = ([place for place in rows if found[place].sample.label == label] for label in (1, 0))
    figures: list[float | None] = []
    for values in (np.array([item.cosine for item in found]), shares):
        good, bad = values[wanted].tolist(), values[others].tolist()
        figures += [auc(good, bad), recall_at(good, bad, 0.01), recall_at(good, bad, 0.05)]
    figures += [share([served[place] for place in part]) for part in (wanted, others)]
    cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
    cosine, judge, hits = ", ".join(cells[:2]), ", ".join(cells[3:6]), ", ".join(cells[6:])
    return f"| {name} | {len(rows)} | {cosine} | {judge} | {hits} |"


def write(folder: Path, graph: bytes, source: Path, document: Mapping[str, Any], text: str) -> None:
    """Write graph, head and card."""
    sums = {
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "words_sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((source / "tokenizer.json").read_bytes()).hexdigest(),
    }
    (folder / GRAPH).write_bytes(graph)
    (folder / HEAD).write_bytes(orjson.dumps({**sums, **document}, option=orjson.OPT_INDENT_2))
    (folder / HEAD).with_suffix(".md").write_text(text)
