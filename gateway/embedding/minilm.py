"""MiniLM itself: tokenizer and graph, synchronous. Who may call it when is the batcher's business.

The graph runs in loops of ours where the processor is made for them (`encoder.py`), else on onnxruntime.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gateway.embedding import EmbedderError, Embedding
from gateway.embedding.encoder import Encoder, Tables, Unfit, constants_of

if TYPE_CHECKING:
    import onnxruntime

DIM = 384
GRAPH_VERSION = 1
"""Raised with every change of `build.py` or of this file that changes a vector."""
WINDOW = 256
"""Tokens, the two markers included: the length the model was trained with."""
PREVIEW = 64
"""Tokens that are looked at of a text beyond the window. Its vector is never compared, it only tells the category, and
attention over a full window takes five times as long."""
MAX_CHARS = 16 * WINDOW
"""A longer text is cut before tokenising: 50 MB must cost nothing, and ordinary text needs five characters a token."""
MAX_ROWS = 512
"""Tokens in one run; bounds the memory of activations."""

Ids = Sequence[int]
Floats = NDArray[np.float32]

_log = logging.getLogger(__name__)


class MiniLM:
    """One loaded model. Not for concurrent use."""

    def __init__(self, model: str | bytes, tokenizer: Path, *, threads: int = 1) -> None:
        """Load from a file's path or a model's bytes. Raises what the two libraries raise."""
        self._vectors = _loops(model) if threads == 1 else None
        """Of a batch, [texts, DIM]."""
        if self._vectors is None:
            self._vectors = graph(model, threads=threads)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        # The file's own settings pad every text to 128 tokens.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._end: int = self._tokenizer.encode("").ids[-1]
        self._unknown = self._tokenizer.token_to_id("[UNK]")

    def encode(self, texts: Sequence[str]) -> list[Embedding]:
        """Embed texts, in their order. A vector does not depend on the other texts. Raises EmbedderError."""
        tokens = [self._tokens(text) for text in texts]
        vectors = np.empty((len(texts), DIM), np.float32)
        for group in group_by_length([len(ids) for ids, _ in tokens]):
            vectors[group] = self._run([tokens[index][0] for index in group])
        return [
            # A copy: a view would keep the whole batch alive as long as one of its vectors.
            Embedding(vector=vector.copy(), truncated=partial)
            for vector, (_, partial) in zip(vectors, tokens, strict=True)
        ]

    def _tokens(self, text: str) -> tuple[Ids, bool]:
        """Token ids, and whether they speak of a part of the text only."""
        too_long = len(text) > MAX_CHARS
        try:
            ids: list[int] = self._tokenizer.encode(text[: 16 * PREVIEW] if too_long else text).ids
        except Exception as error:  # tokenizers raises TypeError on lone surrogates, and bare Exception elsewhere
            raise EmbedderError(f"the text cannot be tokenised: {error}") from error
        if too_long or len(ids) > WINDOW:
            return [*ids[: PREVIEW - 1], self._end], True
        return ids, self._unknown in ids

    def _run(self, batch: Sequence[Ids]) -> Floats:
        assert self._vectors is not None
        try:
            return self._vectors(batch)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise EmbedderError(f"the model failed: {error}") from error


Vectors = Callable[[Sequence[Ids]], Floats]


def _loops(model: str | bytes) -> Vectors | None:
    """The int8 graph in loops of ours, where that can be."""
    try:
        constants = constants_of(model if isinstance(model, bytes) else Path(model).read_bytes())
        # Copies, so that the file's bytes go.
        words, scales, places = (constants[name].copy() for name in ("words", "words.scale", "places"))
        encoder = Encoder(constants, Tables(words, places, scales))
    except (Unfit, ValueError, KeyError) as error:
        _log.info("the embedder runs on onnxruntime: %s", error)
        return None

    def vectors(batch: Sequence[Ids]) -> Floats:
        return encoder.means(encoder.rows(batch), [len(ids) for ids in batch], unit=True)

    return vectors


def graph(model: str | bytes, *, threads: int) -> Vectors:
    """Any of `build.py`'s graphs on onnxruntime. Raises what that raises."""
    session = new_session(model, threads)

    def vectors(batch: Sequence[Ids]) -> Floats:
        (found,) = session.run(None, feeds(batch))
        first: Floats = found[:, 0]
        return first

    return vectors


def feeds(batch: Sequence[Ids]) -> dict[str, NDArray[np.generic]]:
    """The graph's inputs for token ids of one or more texts, padded to the longest."""
    lengths = np.array([len(ids) for ids in batch], np.int32)
    tokens = int(lengths.max())
    inside = np.arange(tokens) < lengths[:, None]
    ids = np.zeros(inside.shape, np.int64)
    ids[inside] = [token for text in batch for token in text]
    return {
        "ids": ids.reshape(1, -1),
        "positions": np.tile(np.arange(tokens, dtype=np.int64), len(batch))[None],
        "shape": np.array([len(batch), tokens, DIM], np.int64),
        "lengths": lengths,
        "pool": (inside / lengths[:, None]).astype(np.float32)[:, None],
    }


def group_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups of like length, so that padding stays under about a quarter and a run under MAX_ROWS."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        if group and (length > lengths[group[0]] * 1.25 + 2 or length * (len(group) + 1) > MAX_ROWS):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def new_session(model: str | bytes, threads: int) -> onnxruntime.InferenceSession:
    """How a model runs beside a server: few threads, no memory kept for shapes seen once."""
    import onnxruntime  # 40 MB and a tenth of a second, which most never need

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A plan of the memory would be kept for every shape ever seen.
    options.enable_mem_pattern = False
    # Waiting threads must not burn the core that serves.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
