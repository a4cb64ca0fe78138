"""Sharing across tenants: an answer enters a shared scope only after independent tenants got agreeing ones.

Whoever can write into a shared cache can poison it. So a question's answer is held back until `tenants` different
tenants asked that same question on their own and their answers agree; a tenant has one voice per question, its last.
This stops one tenant, not `tenants` tenants that conspire; what identifies a tenant is the gateway's business.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise

Gist = bytes
"""What is remembered of an answer that waits: its words, or a digest of them."""

_LONGEST_GIST = 1024
"""Bytes; of longer answers only a digest is kept, and they agree only if they are the same."""
_DIGEST = b"\0"
"""What a digest begins with; no word does."""
_WORD = re.compile(r"\w+(?:['’.,:]\w+)*")
_DENIES = frozenset(b"no not never none nothing neither nor cannot without false wrong kein keine nicht nie".split())
_ALIKE = 0.6
"""Share of the word pairs of two answers that they must have in common."""


def gist(answer: str) -> Gist:
    """Return what is kept of an answer: at most `_LONGEST_GIST` bytes, without case and punctuation."""
    words = " ".join(_WORD.findall(answer.lower().replace("’", "'"))).encode("utf-8", "replace")
    return words if len(words) <= _LONGEST_GIST else _DIGEST + blake2b(words, digest_size=31).digest()


def agree(one: Gist, other: Gist) -> bool:
    """Whether two answers say the same: equal, or almost the same words in order with equal numbers and denials."""
    if one == other:
        return bool(one)
    if one[:1] == _DIGEST or other[:1] == _DIGEST:
        return False
    words, others = one.split(), other.split()
    if _decisive(words) != _decisive(others):
        return False
    pairs, other_pairs = set(pairwise(words)), set(pairwise(others))
    either = pairs | other_pairs
    return bool(either) and len(pairs & other_pairs) >= _ALIKE * len(either)


def _decisive(words: list[bytes]) -> list[bytes]:
    """The words of which one changes everything: numbers, and what denies."""
    return sorted(
        word for word in words if word in _DENIES or word.endswith(b"n't") or any(48 <= byte <= 57 for byte in word)
    )


@dataclass(frozen=True, slots=True)
class SharingRules:
    """When an answer may be shared."""

    tenants: int = 3
    """Independent tenants whose answers must agree; 1 shares at once."""
    window: float = 7 * 86400.0
    """Seconds in which they must have asked."""
    questions: int = 4096
    """Questions that are remembered while they wait."""
    per_tenant: int = 512
    """Of these, how many one tenant alone may hold: a flood pushes out its own first."""

    def __post_init__(self) -> None:
        if self.tenants < 1 or self.per_tenant < 1 or self.questions < self.per_tenant:
            raise ValueError("sharing needs tenants >= 1 and 1 <= per_tenant <= questions")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not shared yet: this many tenants agree so far."""

    agreeing: int


@dataclass(frozen=True, slots=True)
class Confirmed:
    """Enough tenants agree: the answer may enter the shared scope."""


@dataclass(slots=True)
class _Question:
    founder: bytes
    voices: OrderedDict[bytes, tuple[Gist, float]] = field(default_factory=OrderedDict)
    """By tenant, the least recent first: its answer and when it was given."""


_VOICES = 2
"""Voices kept per question, as a multiple of those needed: more would only serve disagreement."""
QUESTION_BYTES = 700
"""What a question costs beside its answers: two places in tables, keys, and the objects around them."""
_VOICE_BYTES = 300


class Confirmations:
    """Who confirmed what; bounded, and pure: time is an argument, in seconds."""

    def __init__(self, rules: SharingRules) -> None:
        self._rules = rules
        self._questions: OrderedDict[bytes, _Question] = OrderedDict()
        self._held: dict[bytes, OrderedDict[bytes, None]] = {}
        """By tenant: the questions that it was first to ask, oldest first."""
        self.bytes = 0
        """What all this takes in memory, about."""

    def __len__(self) -> int:
        """Questions that wait."""
        return len(self._questions)

    def offer(self, question: bytes, tenant: bytes, answer: Gist, now: float) -> Waiting | Confirmed:
        """Take one tenant's own answer to a question; `question` is the key without the tenant's namespace."""
        if self._rules.tenants == 1:
            return Confirmed()
        entry = self._questions.get(question)
        if entry is None:
            entry = self._begin(question, tenant)
        self._questions.move_to_end(question)
        self._silence(entry, tenant)
        for other in [name for name, (_, given) in entry.voices.items() if now - given > self._rules.window]:
            self._silence(entry, other)
        agreeing = 1 + sum(agree(answer, other) for other, _ in entry.voices.values())
        if agreeing >= self._rules.tenants:
            self.forget(question)
            return Confirmed()
        entry.voices[tenant] = (answer, now)
        self.bytes += _VOICE_BYTES + len(answer)
        if len(entry.voices) > _VOICES * self._rules.tenants:
            self._silence(entry, next(iter(entry.voices)))
        return Waiting(agreeing)

    def forget(self, question: bytes) -> None:
        """Drop what is known of a question, as when its answer was purged or found wrong."""
        entry = self._questions.pop(question, None)
        if entry is None:
            return
        for tenant in list(entry.voices):
            self._silence(entry, tenant)
        self.bytes -= QUESTION_BYTES
        held = self._held[entry.founder]
        del held[question]
        if not held:
            del self._held[entry.founder]

    def check(self) -> None:
        """Raise AssertionError if the tables or the byte counter disagree, or a bound is exceeded."""
        held = {question: tenant for tenant, questions in self._held.items() for question in questions}
        assert held == {question: entry.founder for question, entry in self._questions.items()}
        assert len(self._questions) <= self._rules.questions
        assert all(0 < len(questions) <= self._rules.per_tenant for questions in self._held.values())
        voices = [answer for entry in self._questions.values() for answer, _ in entry.voices.values()]
        assert self.bytes == QUESTION_BYTES * len(self) + sum(_VOICE_BYTES + len(answer) for answer in voices)

    def _silence(self, entry: _Question, tenant: bytes) -> None:
        voice = entry.voices.pop(tenant, None)
        if voice is not None:
            self.bytes -= _VOICE_BYTES + len(voice[0])

    def _begin(self, question: bytes, tenant: bytes) -> _Question:
        held = self._held.get(tenant)
        if held is not None and len(held) >= self._rules.per_tenant:
            self.forget(next(iter(held)))
        elif len(self._questions) >= self._rules.questions:
            self.forget(next(iter(self._questions)))
        entry = _Question(tenant)
        self._questions[question] = entry
        self._held.setdefault(tenant, OrderedDict())[question] = None
        self.bytes += QUESTION_BYTES
        return entry
