"""How often the semantic tier answers, and how often wrongly: `hitpath eval pairs` and `hitpath eval categories`.

python -m loadtest.evaluate pairs FILE... [--config FILE] [--json]
python -m loadtest.evaluate categories FILE... [--config FILE] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from cachestore import Document, Hit, Store, StoreError
from gateway import settings as settings_file
from gateway.app import open_embedder, open_judge, open_store, semantic_room
from gateway.embedding import Embedder, EmbedderError, Embedding
from gateway.judge import JudgeError
from gateway.judge.pairjudge import PairJudge
from gateway.semantic import Looked, SemanticRoom
from gateway.settings import Settings, SettingsError
from gateway.timing import Timing
from loadtest.data import DataError, read_rows, text_field
from loadtest.metrics import auc, recall_at, share
from policies.canonical import Origin, digest, shaping_fields
from policies.category import CallFacts, CategoryPolicy, CategoryTable
from policies.classifier import CategoryHead
from policies.controls import Controls, Mode
from policies.judge import Judge
from policies.reasons import NotStored
from policies.scope import Comparable, comparable

CHUNK = 256
"""Pairs at once."""
MODEL = "eval"
NEVER = -1.0
"""The score of a pair that no threshold would serve: a text too long to compare."""
_ANY = 0.999
"""An error budget that hardly refuses."""
_DAY = 86400.0
_CONTROLS = Controls()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions, and whether one answer serves both: 1, 0, or -1 where people cannot say."""

    a: str
    b: str
    label: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the lookup made of a pair."""

    label: int
    score: float
    """The judge's, whatever the thresholds and modes."""
    served: bool
    """Whether `a`'s answer would have been served for `b` at the effective settings."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """One file's figures; None where a figure is undefined."""

    file: str
    pairs: int
    positives: int
    negatives: int
    auc: float | None
    recall_at_1pct_false: float | None
    recall_at_5pct_false: float | None
    positives_served: float | None
    negatives_served: float | None


def read_pairs(path: Path) -> list[Pair]:
    """Read `{a, b, label}` lines. Raises DataError with file and row."""
    pairs = []
    for number, row in enumerate(read_rows(path), 1):
        label = row.get("label")
        if label not in (1, 0, -1) or isinstance(label, bool):
            raise DataError(f"{path}: row {number}: 'label' must be 1, 0 or -1")
        pairs.append(Pair(text_field(path, number, row, "a"), text_field(path, number, row, "b"), label))
    return pairs


def report_pairs(file: str, outcomes: Sequence[Outcome]) -> PairReport:
    """Sum up; pairs of label -1 must not be among them."""
    positives = [outcome for outcome in outcomes if outcome.label == 1]
    negatives = [outcome for outcome in outcomes if outcome.label == 0]
    wanted, others = [item.score for item in positives], [item.score for item in negatives]
    return PairReport(
        file=file,
        pairs=len(outcomes),
        positives=len(positives),
        negatives=len(negatives),
        auc=auc(wanted, others),
        recall_at_1pct_false=recall_at(wanted, others, 0.01),
        recall_at_5pct_false=recall_at(wanted, others, 0.05),
        positives_served=share([item.served for item in positives]),
        negatives_served=share([item.served for item in negatives]),
    )


class _Remembering:
    """An embedder that asks another once per text: each text is looked up several times here."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, Embedding] = {}
        self.identity = embedder.identity
        self.dim = embedder.dim

    async def learn(self, texts: Iterable[str]) -> None:
        """Embed these together and forget the others."""
        wanted = list(dict.fromkeys(texts))
        found = await asyncio.gather(*(self._embedder.embed(text) for text in wanted))
        self._known = dict(zip(wanted, found, strict=True))

    async def embed(self, text: str) -> Embedding:
        return self._known[text]

    async def close(self) -> None:
        await self._embedder.close()


class _Bench:
    """Asks pairs through the gateway's own room and store; each pair is a tenant of its own."""

    def __init__(self, embedder: _Remembering, store: Store, room: SemanticRoom, table: CategoryTable) -> None:
        self._embedder = embedder
        self._store = store
        self._room = room
        self._table = table
        self._tenants = 0

    async def ask(self, pairs: Sequence[Pair]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for chunk in chunks(pairs, CHUNK):
            await self._embedder.learn(text for pair in chunk for text in (pair.a, pair.b))
            outcomes += await asyncio.gather(*(self._ask(pair) for pair in chunk))
        return outcomes

    async def _ask(self, pair: Pair) -> Outcome:
        self._tenants += 1
        tenant = f"pair-{self._tenants}"
        stored = await self._look(tenant, pair.a, open_to_all=True)
        if stored.vector is None:
            return Outcome(pair.label, NEVER, served=False)
        await self._put(tenant, pair.a, stored)
        scored = await self._look(tenant, pair.b, open_to_all=True)
        # What is refused although all is let through to the judge is refused at any settings.
        served = isinstance(scored.found, Hit) and await self._served(tenant, pair)
        return Outcome(pair.label, NEVER if scored.score is None else scored.score, served)

    async def _served(self, tenant: str, pair: Pair) -> bool:
        """Would the gateway, as it is set, have kept `a` for comparison, and found it?"""
        kept = (await self._look(tenant, pair.a, open_to_all=False)).vector is not None
        return kept and isinstance((await self._look(tenant, pair.b, open_to_all=False)).found, Hit)

    async def _look(self, tenant: str, text: str, *, open_to_all: bool) -> Looked:
        origin, asked = _question(tenant, text)
        facts = CallFacts(endpoint="chat", model=MODEL, namespace=tenant, system="", user=text)
        decided = self._table.decided(_CONTROLS, lambda: facts)
        if open_to_all:
            decided = _open(decided or self._table.fallback())
        return await self._room.look(origin, asked, decided, _CONTROLS, Timing())

    async def _put(self, tenant: str, text: str, looked: Looked) -> None:
        origin, asked = _question(tenant, text)
        now = time.time()
        document = Document(
            key=digest(origin, [asked.text, asked.rest]),
            scope=looked.scope,
            namespace=tenant,
            category=looked.policy.name,
            model=MODEL,
            endpoint="chat",
            upstream=MODEL,
            text=text,
            body=b"{}",
            created=now,
            expires=now + _DAY,
            cost=0.0,
            vector=looked.vector,
        )
        if isinstance(reason := await self._store.put(document), NotStored):
            raise DataError(f"the store refused a question: {reason}; raise cache.memory_budget or cache.disk_budget")


def _open(policy: CategoryPolicy) -> CategoryPolicy:
    """Let everything through to the judge, so that it scores every pair, and let it accept all that any budget may."""
    return replace(policy, mode=Mode.SEMANTIC, threshold=-1.0, error_budget=_ANY)


def _question(tenant: str, text: str) -> tuple[Origin, Comparable]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    asked = comparable("chat", shaping_fields("chat", body))
    assert asked is not None, "a chat with a user turn is comparable"
    return Origin(endpoint="chat", namespace=tenant, backend=MODEL), asked


def chunks(items: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    """Cut a sequence into runs of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


@asynccontextmanager
async def _bench(settings: Settings, embedder: Embedder, judge: Judge) -> AsyncIterator[_Bench]:
    """A fresh store in a temporary directory, everything else as the settings say."""
    table = settings.cache.table(judged=isinstance(judge, PairJudge))
    with tempfile.TemporaryDirectory(prefix="hitpath-eval-") as folder:
        remembering = _Remembering(embedder)
        store = await open_store(settings.model_copy(update={"data_dir": Path(folder)}), table, remembering)
        try:
            room = semantic_room(remembering, store, judge, table)
            assert room is not None, "there is an embedder"
            await store.loaded.wait()
            yield _Bench(remembering, store, room, table)
        finally:
            await store.close()


async def evaluate_pairs(paths: Sequence[Path], settings: Settings) -> list[PairReport]:
    """Measure each file in turn. Raises DataError, EmbedderError, JudgeError, StoreError."""
    files = [read_pairs(path) for path in paths]
    found = await ask_all(files, settings)
    return [report_pairs(str(path), outcomes) for path, outcomes in zip(paths, found, strict=True)]


async def ask_all(sets: Sequence[Sequence[Pair]], settings: Settings) -> list[list[Outcome]]:
    """Ask every set of pairs a fresh store, those of label -1 left out. Raises what `evaluate_pairs` does."""
    judge = await open_judge(settings)
    embedder = await _embedder(settings)
    try:
        found = []
        for pairs in sets:
            async with _bench(settings, embedder, judge) as bench:
                found.append(await bench.ask([pair for pair in pairs if pair.label != -1]))
        return found
    finally:
        await embedder.close()
        await judge.close()


async def _embedder(settings: Settings) -> Embedder:
    embedder = await open_embedder(settings, settings.cache.table())
    if embedder is None:
        raise EmbedderError("the settings compare nothing by meaning: there is nothing to measure")
    return embedder


@dataclass(frozen=True, slots=True)
class CategoryReport:
    """One file's figures."""

    file: str
    rows: int
    accuracy: float | None
    by_category: dict[str, float]
    """Share of a category's rows that were recognised."""
    confusion: dict[str, dict[str, int]]
    """True category, then the answer, then how often."""


async def evaluate_categories(paths: Sequence[Path], settings: Settings) -> list[CategoryReport]:
    """Classify every row of `{text, category}` files. Raises DataError, EmbedderError."""
    files = [(path, read_categories(path)) for path in paths]
    embedder, head = await _embedder(settings), CategoryHead.load()
    try:
        if not head.fits(embedder.identity):
            raise EmbedderError(f"the classifier was trained for {head.embedder}, not for {embedder.identity}")
        return [report_categories(str(path), rows, await _classified(rows, embedder, head)) for path, rows in files]
    finally:
        await embedder.close()


def read_categories(path: Path) -> list[tuple[str, str]]:
    """Read texts and their categories. Raises DataError with file and row."""
    return [
        (text_field(path, number, row, "text"), text_field(path, number, row, "category"))
        for number, row in enumerate(read_rows(path), 1)
    ]


def report_categories(file: str, rows: Sequence[tuple[str, str]], answers: Sequence[str]) -> CategoryReport:
    """Sum up; `answers` belong to `rows` in order."""
    truth = [category for _, category in rows]
    counts = Counter(zip(truth, answers, strict=True))
    totals = Counter(truth)
    names = sorted({*truth, *answers})
    return CategoryReport(
        file=file,
        rows=len(rows),
        accuracy=share([wanted == answer for wanted, answer in zip(truth, answers, strict=True)]),
        by_category={name: counts[name, name] / totals[name] for name in names if totals[name]},
        confusion={
            name: {answer: counts[name, answer] for answer in names if counts[name, answer]}
            for name in names
            if totals[name]
        },
    )


async def _classified(rows: Sequence[tuple[str, str]], embedder: Embedder, head: CategoryHead) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(rows), CHUNK):
        texts = [text for text, _ in rows[start : start + CHUNK]]
        found = await asyncio.gather(*(embedder.embed(text) for text in texts))
        answers += [head.classify(embedding.vector)[0] for embedding in found]
    return answers


def pairs_table(reports: Sequence[PairReport]) -> str:
    """For people."""
    heads = ("pairs", "positive", "negative", "AUC", "recall@1%", "recall@5%", "served+", "served-")
    width = max([len(Path(report.file).name) for report in reports] + [4])
    lines = [" ".join([f"{'file':<{width}}", *(f"{head:>9}" for head in heads)])]
    for report in reports:
        file, *figures = asdict(report).values()
        lines.append(" ".join([f"{Path(file).name:<{width}}", *(f"{_figure(figure):>9}" for figure in figures)]))
    lines += ["", "recall@x%: share of the positives above the score that x % of the negatives exceed"]
    lines += ["served: share that would be answered from the cache at the effective settings"]
    return "\n".join(lines)


def categories_table(reports: Sequence[CategoryReport]) -> str:
    """For people."""
    lines = []
    for report in reports:
        lines += [f"{report.file}: {report.rows} rows, accuracy {_figure(report.accuracy)}"]
        for name, recognised in report.by_category.items():
            others = Counter({answer: count for answer, count in report.confusion[name].items() if answer != name})
            mistaken = ", ".join(f"{answer} {count}" for answer, count in others.most_common(4))
            lines += [f"  {name:<14} {recognised:.3f}  {f'taken for {mistaken}' if mistaken else ''}".rstrip()]
    return "\n".join(lines)


def _figure(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns 0, 1 when it failed, 2 when the command line or settings are wrong."""
    chosen = _parser().parse_args(arguments)
    try:
        settings = settings_file.load(chosen.config)
        print(asyncio.run(_output(chosen, settings)))
    except SettingsError as error:
        print(f"hitpath eval: {error}", file=sys.stderr)
        return 2
    except (DataError, EmbedderError, JudgeError, StoreError) as error:
        print(f"hitpath eval: {error}", file=sys.stderr)
        return 1
    return 0


async def _output(chosen: argparse.Namespace, settings: Settings) -> str:
    if chosen.what == "pairs":
        pairs = await evaluate_pairs(chosen.files, settings)
        return _json(pairs) if chosen.json else pairs_table(pairs)
    categories = await evaluate_categories(chosen.files, settings)
    return _json(categories) if chosen.json else categories_table(categories)


def _json(reports: Sequence[Any]) -> str:
    return orjson.dumps({"files": reports}).decode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hitpath eval", description="Measure the semantic tier, or the classifier.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, what in (
        ("pairs", "recall and false hits on labelled pairs: {a, b, label} per line, .gz too"),
        ("categories", "accuracy of the classifier: {text, category} per line, .gz too"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("files", nargs="+", type=Path, metavar="FILE")
        command.add_argument("--config", type=Path, help="settings file; without one the defaults hold")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
