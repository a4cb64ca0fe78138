"""What reuse is measured on: prompts of several chunks and an ending, read from a file or written by the model itself.

A model that nothing is known of has no texts that may be shipped with it, so it writes some: documents drawn from its
own distribution, with fixed seeds, of which every prompt has a few in random order. Each prompt ends with the beginning
of a passage of one of them, as a question about the documents would: what the model then says must be read there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.errors import RequestError, SettingsError
from engine.requests import Message
from engine.reuse.finding import Marks, Span, marked_spans, text_parts, token_spans
from engine.reuse.trial import Trial
from engine.tokenizer import ChatTokenizer

DOCUMENT = 128
"""Tokens of a document that the model writes."""
_DOCUMENTS = 14
_SEVERAL = (4, 7)
"""Documents of a prompt: from 4 to 6."""
_PASSAGE = 24
"""Tokens of a document that stand again at the end of the prompt."""
_SMALLEST = 32
_FIELDS = {frozenset(("chunks", "question")), frozenset(("messages",))}


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation, and its texts in order: the chunks, and last what stands behind them."""

    messages: tuple[Mapping[str, Any], ...]
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """An example as tokens."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    """Where its chunks are; at least one, and something behind the last."""

    @property
    def head(self) -> tuple[int, ...]:
        """What stands before the first chunk."""
        return self.tokens[: self.spans[0][0]]

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the chunks."""
        return tuple(self.tokens[start:stop] for start, stop in self.spans)


def question_about(chunks: Sequence[str], question: str) -> Example:
    """Chunks and a question as one message."""
    parts = (*chunks, question)
    return Example(({"role": "user", "content": "\n".join(parts)},), parts)


def read(path: Path, most: int) -> list[Example]:
    """The first `most` examples of a JSONL file. Raises SettingsError naming file, line and field."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompts: {path}: {error}") from error
    found = [_example(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise SettingsError(f"--prompts: {path}: there is no prompt in it")
    return found[:most]


def sample_of(example: Example, tokenizer: ChatTokenizer, least: int) -> Sample | None:
    """The example as its model's template writes it; None where no chunk has `least` tokens."""
    try:
        text = tokenizer.render(example.messages, None)
    except RequestError as error:
        if error.code != "no_chat_template":
            raise
        text = "\n".join(example.parts)
    tokens, offsets = tokenizer.encode_rendered(text)
    spans = token_spans(offsets, marked_spans(text, example.parts[:-1], Marks()), least)
    spans = tuple(span for span in spans if span[1] < len(tokens))
    return Sample(tuple(tokens), spans) if spans else None


def written(checkpoint: Checkpoint, count: int, context: int) -> list[Example]:
    """`count` examples of documents that the model writes now. Raises SettingsError where the context is too short."""
    size = min(DOCUMENT, context // 10)
    if size < _SMALLEST:
        raise SettingsError(f"a context of {context} tokens is too short for prompts of several chunks; use --prompts")
    documents = _documents(checkpoint, size)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        order = rng.permutation(len(documents))[: int(rng.integers(*_SEVERAL))]
        source = documents[int(rng.choice(order))]
        passage = min(_PASSAGE, len(source) // 2)
        start = int(rng.integers(0, len(source) - passage + 1))
        decode = checkpoint.tokenizer.decode
        found.append(question_about([decode(documents[i]) for i in order], decode(source[start : start + passage])))
    return found


def _documents(checkpoint: Checkpoint, size: int) -> list[list[int]]:
    """Drawn from the model, each begun with another token."""
    silent = torch.tensor([checkpoint.tokenizer.silent(token) for token in range(checkpoint.tokenizer.size)])
    trial, generator = Trial(checkpoint, 2 * size), torch.Generator().manual_seed(0)
    begin = checkpoint.tokenizer.encode_text("")[:1] or [0]

    def draw(scores: Tensor) -> int:
        allowed = scores.float().cpu()[: len(silent)].masked_fill(silent, -torch.inf)
        return int(torch.multinomial(allowed.softmax(-1), 1, generator=generator))

    return [trial.continued(begin, size, draw) for _ in range(_DOCUMENTS)]


def _example(line: str, where: str) -> Example:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"--prompts: {where}: not JSON: {error}") from error
    if not isinstance(value, dict) or frozenset(value) not in _FIELDS:
        given = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise SettingsError(f"--prompts: {where}: expected the fields chunks and question, or messages; got {given}")
    return _conversation(value["messages"], where) if "messages" in value else _asked(value, where)


def _asked(value: Mapping[str, Any], where: str) -> Example:
    chunks, question = value["chunks"], value["question"]
    if not isinstance(chunks, list) or not chunks or not all(isinstance(chunk, str) and chunk for chunk in chunks):
        raise SettingsError(f"--prompts: {where}: chunks: expected a list of texts, one at least and none empty")
    if not isinstance(question, str) or not question:
        raise SettingsError(f"--prompts: {where}: question: expected a text")
    return question_about(chunks, question)


def _conversation(messages: Any, where: str) -> Example:
    if not isinstance(messages, list) or not messages:
        raise SettingsError(f"--prompts: {where}: messages: expected a list, one at least")
    plain = []
    for place, message in enumerate(messages):
        try:
            plain.append(Message.model_validate(message).for_template())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("messages", place, *first["loc"])))
            raise SettingsError(f"--prompts: {where}: {field}: {first['msg']}") from error
    parts = tuple(text_parts(messages))
    if len(parts) < 2:
        raise SettingsError(f"--prompts: {where}: messages: expected two texts at least, chunks and what follows them")
    return Example(tuple(plain), parts)
