"""What the bundled model is trained on: rows of tokens made from public-domain books.

Every kind of sample is a function of a random generator, so that the whole run follows from one seed.
A row is a pair (tokens, targets): targets[i] is the token that should follow tokens[i], or IGNORE.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

IGNORE = -100
ANSWER_LIMIT = 48
"""No answer is longer than this many tokens: that is how the model learns to stop whatever it was asked."""

Ids = list[int]
Row = tuple[NDArray[np.int64], NDArray[np.int64]]

_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"”’]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[\"“‘A-Z])"
)
_FOREIGN = ((0x4E00, 0x9FA5), (0x3041, 0x30FF), (0xAC00, 0xD7A3), (0x400, 0x45F), (0x5D0, 0x5EA), (0x1F600, 0x1F64F))
_SYNTAX = [*"{}[]()<>=+-*/;:,.#@!&|$%^~_`\"'\\", "\n", "\n\n", "    ", "\n* ", "\n1. ", "\n- ", "```", "==", "->", "**"]


BEGUN = 0.1
"""Share of the rows of conversations that begin where one begins. The others begin anywhere: a model that always saw
the token that begins conversations rests its attention on it, and can make nothing of a text computed without it."""
HELD_OUT = 0.02
"""Share of every text, its end, that nothing is trained on: what measurements read."""


def read_books(folder: Path) -> str:
    """What is trained on of all texts below `folder/text`, joined. Raises FileNotFoundError when there are none."""
    return "\n\n".join(text[: _border(text)] for text in _texts(folder))


def held_out(folder: Path) -> str:
    """The rest of them. Raises FileNotFoundError."""
    return "\n\n".join(text[_border(text) :] for text in _texts(folder))


def _border(text: str) -> int:
    return len(text) - int(len(text) * HELD_OUT)


def _texts(folder: Path) -> list[str]:
    files = sorted((folder / "text").glob("*.txt.gz"))
    if not files:
        raise FileNotFoundError(f"no *.txt.gz below {folder / 'text'}")
    return [gzip.decompress(file.read_bytes()).decode() for file in files]


@dataclass(frozen=True, slots=True)
class Specials:
    """Ids of the tokens that shape a conversation."""

    begin: int
    end: int
    system: int
    user: int
    assistant: int


class Samples:
    """Makes rows of every kind."""

    def __init__(self, books: str, tokenizer: Tokenizer, specials: Specials, rng: np.random.Generator) -> None:
        self._rng = rng
        self._tokenizer = tokenizer
        self._specials = specials
        self._first_plain = max(specials.begin, specials.end, specials.system, specials.user, specials.assistant) + 1
        self._vocabulary = tokenizer.get_vocab_size()
        paragraphs = [" ".join(p.split()) for p in books.split("\n\n")]
        self._stream = np.array(tokenizer.encode(books).ids, dtype=np.int64)
        sentences = [s for p in paragraphs for s in _SENTENCE_END.split(p) if len(s) > 8 and s[0] not in "#-*"]
        self._opening = [e.ids for e in tokenizer.encode_batch_fast(sentences)]
        self._following = [e.ids for e in tokenizer.encode_batch_fast([" " + s for s in sentences])]
        self._names = sorted(set(re.findall(r"\b[A-Z][a-z]{2,9}\b", books)))
        self._word_starts = {i for t, i in tokenizer.get_vocab().items() if t.startswith("Ġ")}

    def recalled(self, size: int, gap: int) -> NDArray[np.int64]:
        """A passage, another one of `gap` tokens, and the first again."""
        passage = self._stretch(size)
        return np.concatenate((passage, self._stretch(gap), passage))

    def book(self, length: int) -> Row:
        """A stretch of the books."""
        return _shifted(self._stretch(length + 1))

    def repeat(self, length: int) -> Row:
        """A passage, or random tokens, again and again: what makes copying from far away appear."""
        period = int(self._rng.integers(length // 8, length // 2))
        passage = self._random_tokens(period) if self._rng.random() < 0.5 else self._stretch(period)
        return _shifted(np.tile(passage, length // period + 2)[: length + 1])

    def quotes(self, length: int) -> Row:
        """Book text in which earlier fragments come back."""
        pieces: Ids = []
        while len(pieces) <= length:
            size = int(self._rng.integers(20, 120))
            if len(pieces) > 60 and self._rng.random() < 0.5:
                start = int(self._rng.integers(0, len(pieces) - 40))
                pieces += pieces[start : start + size]
            else:
                pieces += self._stretch(size).tolist()
        return _shifted(np.array(pieces[: length + 1], dtype=np.int64))

    def facts(self, length: int) -> Row:
        """Lists of `name: value` with questions that recall them."""
        ids: Ids = []
        while len(ids) <= length:
            ids += self._encode(self._fact_list(int(self._rng.integers(4, 24))))
        return _shifted(np.array(ids[: length + 1], dtype=np.int64))

    def chats(self, length: int, *, longest_turn: int = 400) -> Row:
        """Conversations one after another; every answer is short and ends with the end-of-turn token."""
        ids, skipped = self._opened()
        targets: Ids = [IGNORE] * len(ids)
        while len(ids) <= skipped + length:
            for part, learned in self._conversation(min(longest_turn, length - ANSWER_LIMIT - 16)):
                ids += part
                targets += part if learned else [IGNORE] * len(part)
        return _cut(ids, targets[1:], skipped, length)

    def endings(self, length: int) -> Row:
        """Conversations whose answers went astray: nothing of them is learned but that they must end.

        The end is the target behind the last token, and behind every token beyond the limit.
        """
        special = self._specials
        ids, skipped = self._opened()
        targets: Ids = [IGNORE] * len(ids)
        while len(ids) <= skipped + length:
            user = self._user_text(int(np.exp(self._rng.uniform(np.log(2), np.log(200)))))
            asked = [special.user, *user, special.end, special.assistant]
            astray = self._astray(int(self._rng.integers(8, 250)))
            ids += [*asked, *astray, special.end]
            late = max(0, len(astray) - ANSWER_LIMIT)
            targets += [IGNORE] * (len(asked) + len(astray) - late) + [special.end] * (late + 1)
        return _cut(ids, targets[1:], skipped, length)

    def long_chat(self, length: int) -> Row:
        """One conversation whose user turn fills the row; it ends with the answer."""
        answer = self._answer_from(int(self._rng.integers(len(self._opening))))
        end = [self._specials.end, self._specials.assistant, *answer, self._specials.end]
        user: Ids = [self._specials.begin, self._specials.user] if self._rng.random() < BEGUN else []
        while len(user) < length + 1 - len(end):
            user += self._user_text(int(self._rng.integers(50, 800)))
        return _shifted(np.array(user[: length + 1 - len(end)] + end, dtype=np.int64))

    def _opened(self) -> tuple[Ids, int]:
        """What a row of conversations begins with, and how many of its first tokens are left out."""
        if self._rng.random() < BEGUN:
            return [self._specials.begin], 0
        return [], int(self._rng.integers(400))

    def _conversation(self, longest_turn: int) -> list[tuple[Ids, bool]]:
        """Parts of one conversation, and whether each is to be predicted."""
        special = self._specials
        parts: list[tuple[Ids, bool]] = []
        if self._rng.random() < 0.3:
            system = self._opening[int(self._rng.integers(len(self._opening)))]
            parts.append(([special.system, *system[:120], special.end], True))
        for _ in range(int(self._rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))):
            parts += self._turn(longest_turn)
        return parts

    def _turn(self, longest: int) -> list[tuple[Ids, bool]]:
        special, draw = self._specials, self._rng.random()
        length = int(np.exp(self._rng.uniform(np.log(2), np.log(longest))))
        if draw < 0.40:
            user, following = self._passage(length)
            answer = self._answer_from(following)
        elif draw < 0.55:
            user = self._user_text(length)
            answer = self._quote(user)
        elif draw < 0.65:
            user, answer = self._question()
        else:
            user = self._user_text(length)
            answer = self._answer_from(int(self._rng.integers(len(self._opening))))
        asked = ([special.user, *user, special.end, special.assistant], True)
        if self._rng.random() < 0.06:
            # An answer that has gone astray: only that it must end now is learned, not the loop itself.
            return [asked, (self._loop(), False), ([special.end], True)]
        return [asked, ([*answer, special.end], True)]

    def _passage(self, length: int) -> tuple[Ids, int]:
        """About `length` tokens of consecutive sentences, and the index of the sentence after them."""
        at = int(self._rng.integers(len(self._opening) - 1))
        ids = list(self._opening[at])
        at += 1
        while len(ids) < length and at < len(self._opening) - 1:
            ids += self._following[at]
            at += 1
        return ids[: max(length, 2)], at

    def _answer_from(self, sentence: int) -> Ids:
        """One to three sentences, cut at a word's end where they are too long."""
        count = int(self._rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
        ids = list(self._opening[sentence])
        for following in self._following[sentence + 1 : sentence + count]:
            ids += following
        limit = int(self._rng.integers(12, ANSWER_LIMIT + 1))
        if len(ids) <= limit:
            return ids
        cuts = [i for i in range(4, limit + 1) if ids[i] in self._word_starts]
        return ids[: cuts[-1] if cuts else limit]

    def _quote(self, user: Ids) -> Ids:
        size = int(self._rng.integers(3, 28))
        start = int(self._rng.integers(0, max(1, len(user) - size)))
        return user[start : start + size]

    def _loop(self) -> Ids:
        """A phrase said over and over."""
        phrase: Ids = self._stretch(int(self._rng.integers(1, 9))).tolist()
        length = int(self._rng.integers(max(4, 2 * len(phrase)), ANSWER_LIMIT + 1))
        return (phrase * length)[:length]

    def _astray(self, length: int) -> Ids:
        """An answer as the model would write it when it has lost its way: a loop, a list, noise, or endless prose."""
        draw = self._rng.random()
        if draw < 0.3:
            return (self._loop() * length)[:length]
        if draw < 0.5:
            return self._encode(self._fact_list(24))[:length]
        return self._user_text(length)

    def _question(self) -> tuple[Ids, Ids]:
        lines, name, value = self._facts(int(self._rng.integers(2, 12)))
        return self._encode(f"{lines}\nWhat is {name}?"), self._encode(f"{name} is {value}.")

    def _fact_list(self, count: int) -> str:
        lines, name, value = self._facts(count)
        return f"{lines}\nWhat is {name}? {name} is {value}.\n"

    def _facts(self, count: int) -> tuple[str, str, str]:
        names = self._rng.choice(len(self._names), size=(count, 2))
        pairs = [(f"{self._names[a]} {self._names[b]}", self._value()) for a, b in names.tolist()]
        name, value = pairs[int(self._rng.integers(count))]
        return "\n".join(f"{n}: {v}" for n, v in pairs), name, value

    def _value(self) -> str:
        if self._rng.random() < 0.5:
            return str(int(self._rng.integers(0, 10_000)))
        name: str = self._names[int(self._rng.integers(len(self._names)))]
        return name.lower()

    def _user_text(self, length: int) -> Ids:
        """Whatever people send: prose, noise, code-like text, foreign scripts, lists, digits."""
        kinds: Sequence[Callable[[int], Ids]] = (
            lambda n: self._passage(n)[0],
            lambda n: self._random_tokens(n).tolist(),
            self._foreign,
            self._code_like,
            self._shuffled,
        )
        kind = kinds[int(self._rng.choice(len(kinds), p=[0.35, 0.15, 0.1, 0.25, 0.15]))]
        return kind(length)[: max(2, length)]

    def _foreign(self, length: int) -> Ids:
        low, high = _FOREIGN[int(self._rng.integers(len(_FOREIGN)))]
        return self._encode("".join(map(chr, self._rng.integers(low, high, size=max(2, length // 2)))))

    def _code_like(self, length: int) -> Ids:
        """Words, syntax and numbers in one line after another."""
        pieces: list[str] = []
        for draw in self._rng.random(max(2, length // 2)):
            if draw < 0.5:
                pieces.append(self._names[int(draw * 2 * len(self._names))].lower())
            elif draw < 0.9:
                pieces.append(_SYNTAX[int((draw - 0.5) / 0.4 * len(_SYNTAX))])
            else:
                pieces.append(str(int((draw - 0.9) * 99_999)))
            if self._rng.random() < 0.5:
                pieces.append(" ")
        return self._encode("".join(pieces))

    def _shuffled(self, length: int) -> Ids:
        shuffled: Ids = self._rng.permutation(self._stretch(max(2, length))).tolist()
        return shuffled

    def _stretch(self, length: int) -> NDArray[np.int64]:
        start = int(self._rng.integers(0, len(self._stream) - length))
        return self._stream[start : start + length].copy()

    def _random_tokens(self, length: int) -> NDArray[np.int64]:
        return self._rng.integers(self._first_plain, self._vocabulary, size=max(2, length))

    def _encode(self, text: str) -> Ids:
        ids: Ids = self._tokenizer.encode(text).ids
        return ids


def _cut(ids: Ids, targets: Ids, start: int, length: int) -> Row:
    stop = start + length
    return np.array(ids[start:stop], dtype=np.int64), np.array(targets[start:stop], dtype=np.int64)


def _shifted(ids: NDArray[np.int64]) -> Row:
    return ids[:-1], ids[1:]
