"""The pair model itself: tokenizer, word table and graph, synchronous. Not for concurrent use.

As the embedder's, the graph runs in loops of ours or on onnxruntime.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gateway.embedding.encoder import Encoder, Tables, Unfit, constants_of
from gateway.embedding.minilm import DIM, new_session
from gateway.judge.pairs import TEXT_TOKENS, Row, row
from gateway.judge.words import word_table

MAX_CHARS = 8 * TEXT_TOKENS
"""A longer text has too many tokens anyway, and is not worth tokenising."""

Words = NDArray[np.float32]
Logits = Callable[[Sequence[Row]], list[float]]

_log = logging.getLogger(__name__)


class PairModel:
    """Says of two questions how likely one answer serves both, as a logit."""

    def __init__(self, model: str | bytes, weights: Path, tokenizer: Path, *, threads: int = 1) -> None:
        """`weights` are the embedder's, for its words. Raises what the libraries raise, ValueError, OSError."""
        words = word_table(weights)
        self._run = (_loops(model, words) if threads == 1 else None) or graph(model, words, threads=threads)
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


def _loops(model: str | bytes, words: Words) -> Logits | None:
    """The int8 graph in loops of ours, where that can be."""
    try:
        constants = constants_of(model if isinstance(model, bytes) else Path(model).read_bytes())
        # Copies, so that the file's bytes go.
        places, marks, *top = (constants[name].copy() for name in ("places", "mark", *_TOP))
        encoder = Encoder(constants, Tables(words, places, marks=marks))
    except (Unfit, ValueError, KeyError) as error:
        _log.info("the pair model runs on onnxruntime: %s", error)
        return None
    units, bias, answer, offset = top

    def logits(rows: Sequence[Row]) -> list[float]:
        seen = encoder.rows([item.ids for item in rows], [item.marks for item in rows])
        # Each text of a pair; its markers count with it.
        counts = [count for item in rows for count in (item.second, len(item.ids) - item.second)]
        left, right = encoder.means(seen, counts).reshape(len(rows), 2, DIM).swapaxes(0, 1)
        starts = [0, *accumulate(len(item.ids) for item in rows)][:-1]
        found = np.concatenate((seen[starts], np.abs(left - right), left * right), 1)
        values: list[float] = encoder.dense(encoder.dense(found, units, bias, gated=True), answer, offset)[
            :, 0
        ].tolist()
        return values

    return logits


_TOP = ("units.weight", "units.bias", "answer.weight", "answer.bias")


def graph(model: str | bytes, words: Words, *, threads: int) -> Logits:
    """Any graph of the pair model's on onnxruntime. Raises what that raises."""
    session = new_session(model, threads)

    def logits(rows: Sequence[Row]) -> list[float]:
        (found,) = session.run(None, feeds(rows, words))
        values: list[float] = found[:, 0].tolist()
        return values

    return logits


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
