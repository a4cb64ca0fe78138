"""Finds the pair model's files, checks that they are whole and belong together, and loads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson

from gateway.embedding import EmbedderError
from gateway.embedding.local import find_model
from gateway.judge import JudgeError
from gateway.judge.model import PairModel
from policies.pairhead import PairHead, Points, Weights

FOLDER = Path(__file__).parent
GRAPH = "pair_model.onnx"
HEAD = "pair_model.json"
WARM_UP = ("How do I reset my password?", ("How can I reset my password?", "Where do I change my password?"))


def load(folder: Path = FOLDER, *, threads: int = 1) -> tuple[PairModel, PairHead]:
    """Load model and head for use. Raises JudgeError."""
    graph, document = folder / GRAPH, _document(folder / HEAD)
    if _digest(graph) != document["graph_sha256"]:
        raise JudgeError(f"{graph} is damaged, or not the file that {folder / HEAD} describes")
    try:
        source = find_model()
    except EmbedderError as error:
        raise JudgeError(f"{graph} reads the words of all-MiniLM-L6-v2: {error}") from error
    weights, tokenizer = source / "model.safetensors", source / "tokenizer.json"
    for path, name in ((weights, "words_sha256"), (tokenizer, "tokenizer_sha256")):
        if _digest(path) != document[name]:
            raise JudgeError(f"{path} is not the file that {graph} was trained with")
    try:
        model = PairModel(str(graph), weights, tokenizer, threads=threads)
        model.logits(*WARM_UP)
    except Exception as error:  # neither library has a base class for "cannot load"
        raise JudgeError(f"{graph} cannot be loaded: {error}") from error
    return model, head_of(document)


def head_of(document: dict[str, Any]) -> PairHead:
    """Read the head from a parsed file."""
    return PairHead(
        with_cosine=Weights(**document["with_cosine"]),
        without_cosine=Weights(**document["without_cosine"]),
        categories=dict(document["categories"]),
        points=_points(document["points"]),
        category_points={name: _points(points) for name, points in document["category_points"].items()},
    )


def _points(listed: list[list[float]]) -> Points:
    points = tuple((float(budget), float(point)) for budget, point in listed)
    if not points or [budget for budget, _ in points] != sorted({budget for budget, _ in points}):
        raise ValueError("the points' budgets do not ascend")
    return points


def _document(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = orjson.loads(path.read_bytes())
        head_of(document)
        sums = [document[f"{name}_sha256"] for name in ("graph", "words", "tokenizer")]
        if not all(isinstance(item, str) for item in sums):
            raise ValueError("its parts do not fit")
    except OSError as error:
        raise JudgeError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JudgeError(f"{path} is damaged: {error}") from error
    return document


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise JudgeError(f"{path} cannot be read: {error.strerror}") from error
