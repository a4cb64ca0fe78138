"""Sharing across tenants: an answer enters a shared scope only after independent tenants got agreeing ones.

Whoever can write into a shared cache can poison it. So a question's answer is held back until `tenants` different
tenants asked that same question on their own and their answers agree; a tenant has one voice per question, its last.
This stops one tenant, not `tenants` tenants that conspire; what identifies a tenant is the gateway's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


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
class _Question(Generic[Answer]):
    founder: bytes
    voices: OrderedDict[bytes, tuple[Answer, float]] = field(default_factory=OrderedDict)
    """By tenant, the least recent first: its answer and when it was given."""


_VOICES = 4
"""Voices kept per question, as a multiple of those needed: more would only serve disagreement."""


class Confirmations(Generic[Answer]):
    """Who confirmed what; bounded, and pure: time is an argument, in seconds."""

    def __init__(self, rules: SharingRules, agrees: Callable[[Answer, Answer], bool]) -> None:
        """`agrees` says whether two answers say the same; it is asked for at most a dozen pairs a call."""
        self._rules = rules
        self._agrees = agrees
        self._questions: OrderedDict[bytes, _Question[Answer]] = OrderedDict()
        self._held: dict[bytes, OrderedDict[bytes, None]] = {}
        """By tenant: the questions that it was first to ask, oldest first."""

    def __len__(self) -> int:
        """Questions that wait."""
        return len(self._questions)

    def offer(self, question: bytes, tenant: bytes, answer: Answer, now: float) -> Waiting | Confirmed:
        """Take one tenant's own answer to a question; `question` is the key without the tenant's namespace."""
        entry = self._questions.get(question)
        if entry is None:
            entry = self._begin(question, tenant)
        self._questions.move_to_end(question)
        voices = entry.voices
        voices.pop(tenant, None)
        for other in [name for name, (_, given) in voices.items() if now - given > self._rules.window]:
            del voices[other]
        agreeing = 1 + sum(self._agrees(answer, other) for other, _ in voices.values())
        if agreeing >= self._rules.tenants:
            self.forget(question)
            return Confirmed()
        voices[tenant] = (answer, now)
        if len(voices) > _VOICES * self._rules.tenants:
            voices.popitem(last=False)
        return Waiting(agreeing)

    def forget(self, question: bytes) -> None:
        """Drop what is known of a question, as when its answer was purged or found wrong."""
        entry = self._questions.pop(question, None)
        if entry is None:
            return
        held = self._held[entry.founder]
        del held[question]
        if not held:
            del self._held[entry.founder]

    def check(self) -> None:
        """Raise AssertionError if the two tables disagree or a bound is exceeded."""
        held = {question: tenant for tenant, questions in self._held.items() for question in questions}
        assert held == {question: entry.founder for question, entry in self._questions.items()}
        assert len(self._questions) <= self._rules.questions
        assert all(0 < len(questions) <= self._rules.per_tenant for questions in self._held.values())

    def _begin(self, question: bytes, tenant: bytes) -> _Question[Answer]:
        held = self._held.get(tenant)
        if held is not None and len(held) >= self._rules.per_tenant:
            self.forget(next(iter(held)))
        elif len(self._questions) >= self._rules.questions:
            self.forget(next(iter(self._questions)))
        entry = _Question[Answer](tenant)
        self._questions[question] = entry
        self._held.setdefault(tenant, OrderedDict())[question] = None
        return entry
