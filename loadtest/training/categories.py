"""Train the category head: `python -m loadtest.training.categories [--cache DIR]`.

Writes `policies/category_head.npz` and its card. The figures in the card are of a head that never saw the held-out
part; the head that ships is then fitted in the same way to all rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.embedding.local import MODEL_NAME, load
from gateway.embedding.minilm import MiniLM
from loadtest.data import data_dir, read_rows, text_field
from policies.classifier import CategoryHead

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

SEED = 11
HELD_OUT = 0.2
NEAR_DUPLICATE = 0.9
"""Cosine above which two rows stay on the same side of the split."""
UNITS = 128
EPOCHS = 25
BATCH = 128
RATE = 3e-3
DECAY = 0.1
DROPOUT = 0.5
SMOOTHING = 0.05
TARGET = Path(__file__).resolve().parents[2] / "policies" / "category_head.npz"


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled prompt."""

    text: str
    category: str
    source: str


def read_prompts(path: Path) -> list[Row]:
    """Read `{text, category, source}` lines. Raises DataError."""
    return [
        Row(*(text_field(path, number, row, name) for name in ("text", "category", "source")))
        for number, row in enumerate(read_rows(path), 1)
    ]


def embed(model: MiniLM, texts: Sequence[str]) -> Floats:
    """Vectors of shape [texts, dim]."""
    batches = (texts[start : start + 256] for start in range(0, len(texts), 256))
    return np.stack([embedding.vector for batch in batches for embedding in model.encode(batch)])


def clusters(vectors: Floats, limit: float = NEAR_DUPLICATE) -> list[int]:
    """A cluster number for every row; rows linked by cosines above the limit share one."""
    parents = list(range(len(vectors)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for start in range(0, len(vectors), 1024):
        block = vectors[start : start + 1024] @ vectors.T
        for first, second in zip(*np.nonzero(block > limit), strict=True):
            parents[root(start + int(first))] = root(int(second))
    return [root(row) for row in range(len(vectors))]


def split(categories: Sequence[str], cluster: Sequence[int], seed: int) -> NDArray[np.bool_]:
    """Mark the rows that are held out: whole clusters, the same share of every category."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(cluster):
        members[number].append(row)
    order = list(members.values())
    np.random.default_rng(seed).shuffle(order)
    wanted = {category: HELD_OUT * count for category, count in Counter(categories).items()}
    held = np.zeros(len(categories), np.bool_)
    for rows in order:
        category = categories[rows[0]]
        if wanted[category] > 0:
            wanted[category] -= len(rows)
            held[rows] = True
    return held


def fit(vectors: Floats, answers: Indices, labels: tuple[str, ...], seed: int) -> CategoryHead:
    """Fit the head with AdamW, dropout on the hidden layer and smoothed labels. Deterministic."""
    random = np.random.default_rng(seed)
    weights = _start(random, vectors.shape[1], len(labels))
    optimiser = _AdamW(weights)
    wanted = np.full((len(labels), len(labels)), SMOOTHING / len(labels), np.float32)
    np.fill_diagonal(wanted, 1 - SMOOTHING + SMOOTHING / len(labels))
    for rows in _batches(random, len(vectors)):
        keep = (random.random((len(rows), UNITS)) >= DROPOUT).astype(np.float32) / np.float32(1 - DROPOUT)
        optimiser.step(_gradients(weights, vectors[rows], wanted[answers[rows]], keep))
    return CategoryHead(labels, MODEL_NAME, *weights)


def _start(random: np.random.Generator, dim: int, labels: int) -> list[Floats]:
    def uniform(*shape: int) -> Floats:
        reach = 1 / np.sqrt(shape[0])
        return random.uniform(-reach, reach, shape).astype(np.float32)

    return [uniform(dim, UNITS), np.zeros(UNITS, np.float32), uniform(UNITS, labels), np.zeros(labels, np.float32)]


def _batches(random: np.random.Generator, rows: int) -> Iterator[Indices]:
    for _ in range(EPOCHS):
        order = random.permutation(rows)
        yield from (order[start : start + BATCH] for start in range(0, rows, BATCH))


def _gradients(weights: Sequence[Floats], vectors: Floats, wanted: Floats, keep: Floats) -> list[Floats]:
    """Of the mean cross entropy, by hand: the network has two matrices."""
    hidden, hidden_bias, out, out_bias = weights
    before = vectors @ hidden + hidden_bias
    units = np.maximum(before, 0) * keep
    scores = units @ out + out_bias
    powers = np.exp(scores - scores.max(1, keepdims=True))
    wrong = (powers / powers.sum(1, keepdims=True) - wanted) / np.float32(len(vectors))
    back = (wrong @ out.T) * keep * (before > 0)
    return [vectors.T @ back, back.sum(0), units.T @ wrong, wrong.sum(0)]


class _AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2); changes the weights in place."""

    def __init__(self, weights: list[Floats]) -> None:
        self._weights = weights
        self._first = [np.zeros_like(weight) for weight in weights]
        self._second = [np.zeros_like(weight) for weight in weights]
        self._steps = 0

    def step(self, gradients: Sequence[Floats]) -> None:
        self._steps += 1
        for weight, first, second, gradient in zip(self._weights, self._first, self._second, gradients, strict=True):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            mean, variance = first / (1 - 0.9**self._steps), second / (1 - 0.999**self._steps)
            weight *= 1 - RATE * DECAY
            weight -= RATE * mean / (np.sqrt(variance) + 1e-8)


def save(head: CategoryHead, path: Path) -> None:
    """Write the weights as float16: the answers stay the same and the file halves."""
    np.savez_compressed(
        path,
        labels=np.array(head.labels),
        embedder=np.array(head.embedder),
        hidden=head.hidden.astype(np.float16),
        hidden_bias=head.hidden_bias.astype(np.float16),
        out=head.out.astype(np.float16),
        out_bias=head.out_bias.astype(np.float16),
    )


def card(rows: Sequence[Row], held: NDArray[np.bool_], shares: Floats, labels: Sequence[str]) -> str:
    """The model card; `shares` are the measured head's probabilities for all rows."""
    truth = [row.category for row in rows]
    guess = [labels[index] for index in shares.argmax(1)]
    tested = np.flatnonzero(held).tolist()
    right = {row: truth[row] == guess[row] for row in tested}
    lines = [
        "# Category head",
        "",
        "Told a question's embedding, says which category of rules applies: "
        + ", ".join(f"`{label}`" for label in labels)
        + ".",
        "It names the *subject*, never whether two questions have one answer.",
        "",
        f"- Shape: {shares.shape[1]} labels, one hidden layer of {UNITS} units with ReLU, float16 weights.",
        f"- Embedder: {MODEL_NAME} as Hitpath quantises it; it fits no other embedder.",
        f"- Training: `python -m loadtest.training.categories`, seed {SEED}, {len(rows)} prompts."
        " Weights only; no text ships.",
        f"- Held out: {len(tested)} prompts, {HELD_OUT:.0%} of every category; rows of cosine > {NEAR_DUPLICATE} "
        "stay on one side.",
        "  The figures are of a head that did not see them; the shipped head is fitted in the same way to all rows.",
        "",
        f"**Accuracy on the held-out part: {np.mean(list(right.values())):.3f}**",
        "",
    ]
    lines += _table("category", truth, right) + _table("source", [row.source for row in rows], right)
    lines += ["What becomes of accuracy when answers below a probability are called `general` instead:", ""]
    lines += ["| below | accuracy |", "|---|---|"]
    lines += [
        f"| {limit:.1f} | {_with_fallback(limit, shares, truth, tested, labels):.3f} |"
        for limit in (0.0, 0.3, 0.4, 0.5, 0.6)
    ]
    lines += [
        "",
        "So the likeliest category stands; the probability is handed on for whoever wants to be stricter.",
        "Weak spots: `general` questions of other subjects are the noisiest, and open-ended chat prompts",
        "(`mtbench`, `oasst`) are few in training and mostly taken for the subject they speak of.",
        "English only: the embedder is.",
        "",
    ]
    return "\n".join(lines)


def _table(title: str, names: Sequence[str], right: dict[int, bool]) -> list[str]:
    found: dict[str, list[bool]] = defaultdict(list)
    for row, correct in right.items():
        found[names[row]].append(correct)
    lines = [f"| {title} | held out | accuracy |", "|---|---|---|"]
    lines += [f"| {name} | {len(found[name])} | {np.mean(found[name]):.3f} |" for name in sorted(found)]
    return [*lines, ""]


def _with_fallback(
    limit: float, shares: Floats, truth: Sequence[str], tested: Sequence[int], labels: Sequence[str]
) -> float:
    best = shares.argmax(1)
    named = (labels[best[row]] if shares[row].max() >= limit else "general" for row in tested)
    return float(np.mean([name == truth[row] for name, row in zip(named, tested, strict=True)]))


def main() -> None:
    """Embed, split, measure, fit to all, write weights and card."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.training.categories", description=__doc__)
    parser.add_argument("--cache", type=Path, help="data directory whose embedder file is used again")
    arguments = parser.parse_args()
    rows = read_prompts(data_dir() / "prompts" / "categories.jsonl.gz")
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load(arguments.cache or Path(folder))
        vectors = embed(model, [row.text for row in rows])
    labels = tuple(sorted({row.category for row in rows}))
    answers = np.array([labels.index(row.category) for row in rows], np.int64)
    held = split([row.category for row in rows], clusters(vectors), SEED)
    measured = fit(vectors[~held], answers[~held], labels, SEED)
    text = card(rows, held, measured.probabilities(vectors), labels)
    save(fit(vectors, answers, labels, SEED), TARGET)
    TARGET.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
