"""The pair model itself: tokenizer, word table and ONNX session, synchronous. Not for concurrent use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gateway.embedding.minilm import DIM, session_options
from gateway.judge.pairs import TEXT_TOKENS, Row, row
from gateway.judge.words import word_table

MAX_CHARS = 8 * TEXT_TOKENS
"""A longer text has too many tokens anyway, and is not worth tokenising."""


class PairModel:
    """Says of two questions how likely one answer serves both, as a logit."""

    def __init__(self, model: str | bytes, weights: Path, tokenizer: Path, *, threads: int = 1) -> None:
        """`weights` are the embedder's, for its words. Raises what the libraries raise, ValueError, OSError."""
        self._session = onnxruntime.InferenceSession(model, session_options(threads), ["CPUExecutionProvider"])
        self._words = word_table(weights)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._start, self._end = self._tokenizer.encode("").ids

    def logits(self, text: str, others: Sequence[str]) -> list[float | None]:
        """Compare a text with each of the others; None where one of the two is too long, or no text that has tokens."""
        ids = self.tokens(text)
        rows = [self._row(ids, self.tokens(other)) for other in others]
        known = [found for found in rows if found is not None]
        values = iter(self._run(known) if known else ())
        return [None if found is None else next(values) for found in rows]

    def tokens(self, text: str) -> list[int] | None:
        """Token ids without markers, or None."""
        if len(text) > MAX_CHARS:
            return None
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception:  # tokenizers raises TypeError on lone surrogates, and bare Exception elsewhere
            return None
        return ids if 0 < len(ids) <= TEXT_TOKENS else None

    def _row(self, first: list[int] | None, second: list[int] | None) -> Row | None:
        return None if first is None or second is None else row(first, second, self._start, self._end)

    def _run(self, rows: Sequence[Row]) -> list[float]:
        (logits,) = self._session.run(None, feeds(rows, self._words))
        values: list[float] = logits[:, 0].tolist()
        return values


def feeds(rows: Sequence[Row], words: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """The graph's inputs for a few pairs, padded to the longest."""
    lengths = np.array([len(item.ids) for item in rows], np.int32)
    tokens = int(lengths.max())
    inside = np.arange(tokens) < lengths[:, None]
    ids, marks = np.zeros(inside.shape, np.int64), np.zeros(inside.shape, np.int64)
    ids[inside] = [token for item in rows for token in item.ids]
    marks[inside] = [mark for item in rows for mark in item.marks]
    second = np.arange(tokens) >= np.array([item.second for item in rows])[:, None]
    pool = np.zeros((len(rows), 3, tokens), np.float32)
    pool[:, 0, 0] = 1
    for place, part in ((1, inside & ~second), (2, inside & second)):
        pool[:, place] = part / part.sum(1, keepdims=True)
    return {
        "words": words[ids.reshape(1, -1)],
        "marks": marks.reshape(1, -1),
        "positions": np.tile(np.arange(tokens, dtype=np.int64), len(rows))[None],
        "shape": np.array([len(rows), tokens, DIM], np.int64),
        "lengths": lengths,
        "pool": pool,
    }
