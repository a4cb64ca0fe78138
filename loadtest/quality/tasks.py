"""Held-out prompts of several chunks in shuffled order, with an ending that needs what stands in them.

`quote`: 48 tokens of one of the chunks again. `continuation`: the passage goes on that the chunks were cut from.
`facts`: the chunks are lists of `name: value`, and the ending asks for values and says them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engine.tokenizer import ChatTokenizer

SUFFIX = 48
"""Tokens of the ending, over which methods are compared."""
CHUNK = 128
"""Tokens of a chunk."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids; a full prompt is head, chunks and suffix one after the other."""

    head: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    suffix: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        """The whole of it."""
        return [*self.head, *(token for chunk in self.chunks for token in chunk), *self.suffix]


class Tasks:
    """Makes prompts of every task from held-out text; the same seed gives the same ones."""

    def __init__(self, text: str, tokenizer: ChatTokenizer, head: tuple[int, ...], seed: int) -> None:
        """`text`: nothing of it was trained on. `head`: what every prompt begins with."""
        self._encode, self._head = tokenizer.encode_text, head
        self._stream = np.array(tokenizer.encode_text(text))
        self._names = sorted({word.strip(".,;:!?") for word in text.split() if word[:1].isupper() and word.isascii()})
        self._names = [name for name in self._names if name.isalpha() and 3 <= len(name) <= 10]
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._makers: Mapping[str, Callable[[], Prompt]] = {
            "quote": self._quote,
            "continuation": self._continuation,
            "facts": self._facts,
        }

    def prompt(self, task: str, index: int) -> Prompt:
        """One of the task's prompts, whichever were asked for before. Raises KeyError for an unknown task."""
        maker = self._makers[task]
        self._rng = np.random.default_rng((self._seed, list(self._makers).index(task), index))
        return maker()

    def long(self, chunks: int, size: int) -> Prompt:
        """One prompt of longer chunks, for measuring time."""
        self._rng = np.random.default_rng(self._seed)
        return self._prompt([self._stretch(size) for _ in range(chunks)], self._stretch(SUFFIX))

    def _quote(self) -> Prompt:
        chunks = [self._stretch(CHUNK) for _ in range(self._several())]
        source = chunks[int(self._rng.integers(len(chunks)))]
        start = int(self._rng.integers(0, CHUNK - SUFFIX + 1))
        return self._prompt(chunks, source[start : start + SUFFIX])

    def _continuation(self) -> Prompt:
        count = self._several()
        passage = self._stretch(count * CHUNK + SUFFIX)
        chunks = [passage[at : at + CHUNK] for at in range(0, count * CHUNK, CHUNK)]
        self._rng.shuffle(chunks)
        return self._prompt(chunks, passage[-SUFFIX:])

    def _facts(self) -> Prompt:
        facts: dict[str, str] = {}
        chunks = []
        for _ in range(self._several()):
            ids: list[int] = []
            while len(ids) < CHUNK:
                name = f"{self._name()} {self._name()}"
                facts[name] = str(int(self._rng.integers(0, 10_000)))
                ids += self._encode(f"{name}: {facts[name]}\n")
            chunks.append(ids)
        asked: list[int] = []
        while len(asked) < SUFFIX:
            name = list(facts)[int(self._rng.integers(len(facts)))]
            asked += self._encode(f"What is {name}? {name} is {facts[name]}.\n")
        return self._prompt(chunks, asked[:SUFFIX])

    def _several(self) -> int:
        return int(self._rng.integers(4, 7))

    def _name(self) -> str:
        return self._names[int(self._rng.integers(len(self._names)))]

    def _stretch(self, length: int) -> list[int]:
        start = int(self._rng.integers(0, len(self._stream) - length))
        stretch: list[int] = self._stream[start : start + length].tolist()
        return stretch

    def _prompt(self, chunks: list[list[int]], suffix: list[int]) -> Prompt:
        return Prompt(self._head, tuple(map(tuple, chunks)), tuple(suffix))
