"""Which texts of whom are stored somewhere, and under which names. Bounded; no tensors. Any thread may ask."""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from engine.reuse.finding import RunIndex

WIDTH = 16
"""Tokens of a block of the index: runs of twice as many are always found."""


NAME = 8
"""Bytes of a text's name in context indices: two texts that have the same one cost a few tokens too few, once."""


class Text(NamedTuple):
    """A run of tokens of one owner, whatever versions of it are stored."""

    owner: str
    """As the store salts it; tells nothing of who it is."""
    digest: bytes

    @property
    def name(self) -> bytes:
        """What context indices call it."""
        return self.digest[:NAME]


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens `start` to `stop` of a prompt are those from `offset` on of a known text."""

    text: Text
    tokens: tuple[int, ...]
    """Of the text."""
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class ChunkStored:
    """A text's keys and values are stored from now on, whoever's they are."""

    name: bytes
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkRemoved:
    """They are not any more."""

    name: bytes


ChunkEvent = ChunkStored | ChunkRemoved


def text_of(owner: str, tokens: Sequence[int]) -> Text:
    """The identity of these tokens."""
    return Text(owner, blake2b(struct.pack(f"<{len(tokens)}I", *tokens), digest_size=16).digest())


def name_of(tokens: Sequence[int]) -> bytes:
    """What context indices call these tokens, whoever's they are."""
    return text_of("", tokens).name


@dataclass(slots=True)
class _Entry:
    tokens: tuple[int, ...]
    holders: set[str] = field(default_factory=set)


class Known:
    """Texts and who holds them; a text is forgotten with its last holder, or when there are too many."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of all texts. What is forgotten for that is still found by name."""
        self._most, self._total = most, 0
        self._lock = threading.Lock()
        self._indices: dict[str, RunIndex] = {}
        self._entries: OrderedDict[Text, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, text: Text, tokens: tuple[int, ...], holder: str) -> bool:
        """`holder` has this text from now on; whether it was unknown before."""
        with self._lock:
            new = text not in self._entries
            if new:
                self._enter(text, tokens)
            if (entry := self._entries.get(text)) is not None:
                entry.holders.add(holder)
            return new

    def remove(self, text: Text, holder: str) -> bool:
        """`holder` does not have it any more; whether it was the last one."""
        with self._lock:
            entry = self._entries.get(text)
            if entry is None:
                return False
            entry.holders.discard(holder)
            if entry.holders:
                return False
            self._forget(text)
            return True

    def holders(self, text: Text) -> frozenset[str]:
        """Who has it."""
        with self._lock:
            entry = self._entries.get(text)
            return frozenset() if entry is None else frozenset(entry.holders)

    def find(self, owner: str, tokens: Sequence[int], first: int, least: int) -> tuple[Match, ...]:
        """What of a prompt is known of its owner from token `first` on: runs of `least` tokens or more, in order."""
        with self._lock:
            index = self._indices.get(owner)
            if index is None:
                return ()
            found = []
            for run in index.find(tokens, first):
                if run.stop - run.start >= least:
                    text = Text(owner, run.name)  # type: ignore[arg-type]
                    self._entries.move_to_end(text)
                    found.append(Match(text, self._entries[text].tokens, run.start, run.stop, run.offset))
            return tuple(found)

    def others(self, text: Text, most: int) -> list[tuple[int, ...]]:
        """Other texts of the same owner, the last used first."""
        with self._lock:
            same = (name for name in reversed(self._entries) if name.owner == text.owner and name != text)
            return [self._entries[name].tokens for name, _ in zip(same, range(most), strict=False)]

    def check(self) -> list[str]:
        """What does not add up; empty is good."""
        with self._lock:
            for index in self._indices.values():
                index.check()
            total = sum(len(entry.tokens) for entry in self._entries.values())
            wrong = []
            if not total == self._total <= self._most:
                wrong.append(f"{total} tokens are known, {self._total} are counted, {self._most} may be")
            if sum(map(len, self._indices.values())) != len(self._entries):
                wrong.append("the indices do not hold the known texts")
            return wrong

    def _enter(self, text: Text, tokens: tuple[int, ...]) -> None:
        if len(tokens) > self._most:
            return
        while self._total + len(tokens) > self._most:
            self._forget(next(iter(self._entries)))
        self._indices.setdefault(text.owner, RunIndex(WIDTH)).add(text.digest, tokens)
        self._entries[text] = _Entry(tokens)
        self._total += len(tokens)

    def _forget(self, text: Text) -> None:
        self._total -= len(self._entries.pop(text).tokens)
        index = self._indices[text.owner]
        index.remove(text.digest)
        if not len(index):
            del self._indices[text.owner]
