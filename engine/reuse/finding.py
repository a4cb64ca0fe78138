"""Which runs of a prompt's tokens were computed before. Plain code; no tensors, no model.

Chunks are *cut* where the client marks them: the text parts of a message, tags, separators. They are *found* without
marks: any run of stored tokens, wherever it stands and wherever it begins or ends, as long as a whole aligned block
of it is there. What a border cuts, of a token or of a block, is computed; nothing else is lost by it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no token's part of a hash is lost."""

_CANDIDATES = 8
"""Places of one block that are tried: boilerplate stands everywhere, and one place is as good as another."""

Span = tuple[int, int]
"""From the first to behind the last."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start` to `stop` of a prompt are those from `offset` on of the stored chunk `name`."""

    name: Hashable
    start: int
    stop: int
    offset: int


class RunIndex:
    """Every aligned block of the chunks of one owner. A hash is only a hint where to look: tokens are compared."""

    def __init__(self, width: int = 16) -> None:
        """`width`: tokens of a block; shorter runs are never found, those of 2 · width - 1 always."""
        if width < 1:
            raise ValueError(f"a block of {width} tokens")
        self._width = width
        self._chunks: dict[Hashable, tuple[int, ...]] = {}
        self._blocks: defaultdict[int, dict[tuple[Hashable, int], None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, name: Hashable, tokens: Sequence[int]) -> None:
        """Make a chunk findable. Raises ValueError where the name is taken by other tokens."""
        held = self._chunks.setdefault(name, tuple(tokens))
        if held != tuple(tokens):
            raise ValueError(f"{name!r} names another chunk")
        for offset, block in self._aligned(held):
            self._blocks[block][name, offset] = None

    def remove(self, name: Hashable) -> None:
        """It can no longer be found. Raises KeyError."""
        for offset, block in self._aligned(self._chunks.pop(name)):
            places = self._blocks[block]
            places.pop((name, offset), None)
            if not places:
                self._blocks.pop(block, None)

    def find(self, tokens: Sequence[int], first: int = 0) -> tuple[Run, ...]:
        """Runs of stored tokens from `first` on, in order, apart from each other; of several the longest."""
        runs: list[Run] = []
        hashes, blocks = _hashes(tokens, self._width).tolist(), self._blocks
        start = free = first
        while start < len(hashes):
            if (block := hashes[start]) in blocks:
                run = max(
                    (self._grown(tokens, start, free, *place) for place in islice(blocks[block], _CANDIDATES)),
                    key=lambda run: run.stop - run.start,
                )
                if run.stop - run.start >= self._width:
                    runs.append(run)
                    start = free = run.stop
                    continue
            start += 1
        return tuple(runs)

    def check(self) -> None:
        """Hold blocks against chunks. Raises ValueError."""
        wanted = {(name, offset) for name, held in self._chunks.items() for offset, _ in self._aligned(held)}
        found = [place for places in self._blocks.values() for place in places]
        if len(found) != len(wanted) or set(found) != wanted:
            raise ValueError("the blocks are not those of the chunks")

    def _aligned(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        hashes = _hashes(tokens, self._width)[:: self._width]
        return zip(range(0, len(tokens), self._width), hashes.tolist(), strict=False)

    def _grown(self, tokens: Sequence[int], start: int, free: int, name: Hashable, offset: int) -> Run:
        """The run around a block that seems to be equal, in both directions; empty if it is not."""
        held = self._chunks[name]
        if tuple(tokens[start : start + self._width]) != held[offset : offset + self._width]:
            return Run(name, start, start, offset)
        stop = start + self._width
        most = min(len(tokens) - stop, len(held) - offset - self._width)
        if tuple(tokens[stop : stop + most]) == held[offset + self._width : offset + self._width + most]:
            stop += most  # mostly it is all of it
        while stop < len(tokens) and offset + stop - start < len(held) and tokens[stop] == held[offset + stop - start]:
            stop += 1
        back = 0
        while start - back > free and back < offset and tokens[start - back - 1] == held[offset - back - 1]:
            back += 1
        return Run(name, start - back, stop, offset - back)


@dataclass(frozen=True, slots=True)
class Marks:
    """How clients mark chunks inside a text; what these are is configured."""

    tags: tuple[str, ...] = ()
    """`document`: what stands between `<document …>` and `</document>` is a chunk."""
    separators: tuple[str, ...] = ()
    """Texts between chunks."""

    def cut(self, text: str) -> tuple[Span, ...]:
        """Characters of the chunks of one text: tagged ones, else what separators leave, else all of it."""
        if tagged := self._tagged(text):
            return tagged
        if not any(separator and separator in text for separator in self.separators):
            return ((0, len(text)),)
        pattern, spans, start = "|".join(map(re.escape, filter(None, self.separators))), [], 0
        for match in re.finditer(pattern, text):
            spans.append((start, match.start()))
            start = match.end()
        return tuple((a, b) for a, b in (*spans, (start, len(text))) if b > a)

    def _tagged(self, text: str) -> tuple[Span, ...]:
        if not self.tags:
            return ()
        names = "|".join(map(re.escape, self.tags))
        pattern = rf"<(?P<tag>{names})(?:\s[^<>]*)?>(?P<inside>.*?)</(?P=tag)>"
        return tuple(match.span("inside") for match in re.finditer(pattern, text, re.DOTALL) if match["inside"])


def text_parts(messages: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """The texts of a conversation, part by part, in order."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, Sequence):
            for part in content:
                if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
                    yield text


def marked_spans(rendered: str, parts: Iterator[str] | Sequence[str], marks: Marks) -> tuple[Span, ...]:
    """Characters of the chunks in a conversation as its template wrote it.

    Templates may trim what they are given, and leave parts out: a part that is not there as it was is passed over.
    """
    spans: list[Span] = []
    at = 0
    for part in parts:
        inner = part.strip()
        if not inner or (found := rendered.find(inner, at)) < 0:
            continue
        spans += ((found + a, found + b) for a, b in marks.cut(inner))
        at = found + len(inner)
    return tuple(spans)


def token_spans(offsets: NDArray[np.int64], spans: Sequence[Span], least: int) -> tuple[Span, ...]:
    """Tokens that lie wholly inside each span of characters, where there are `least` or more.

    `offsets` [N, 2]: characters of every token, ascending; tokens without any, as some special ones, belong to nobody.
    """
    tokens = np.flatnonzero(offsets[:, 0] < offsets[:, 1])
    starts, stops = offsets[tokens].T
    chunks: list[Span] = []
    for start, stop in spans:
        first, last = int(np.searchsorted(starts, start)), int(np.searchsorted(stops, stop, "right")) - 1
        if first <= last and (chunk := (int(tokens[first]), int(tokens[last]) + 1))[1] - chunk[0] >= least:
            chunks.append(chunk)
    return tuple(chunks)


def _hashes(tokens: Sequence[int], width: int) -> NDArray[np.uint64]:
    """Hash of every window of `width` tokens, uint64 [len - width + 1]; a polynomial, the same wherever it stands."""
    count = len(tokens) - width + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    values = np.asarray(tokens, dtype=np.uint64) + np.uint64(1)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(width):
        total = total * _BASE + values[place : place + count]
    return total
