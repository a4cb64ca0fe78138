"""Guards: what two questions must not differ in, if one answer is to serve both. A guard can only refuse.

A guard speaks where *each* question has something that the other lacks: two order numbers, two months, a word and its
opposite. Where only one says more, as people do when they rephrase, it is silent, and the pair model decides. Sums are
another matter, since each of their numbers counts: guards speak where one is left out, or changed by what is added.
Guards are for what a small model cannot see because it has never seen it: this very number, name or identifier.

Comparing two texts costs a few set operations, and never raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from policies.facts import Facts
from policies.wordlists import CHANGES, DENIALS, FLIPS, NUMBER_WORDS, SAYS, SMALL_WORDS, TURNING_WORDS, VAGUE

_NEAR = 8
"""Words that only one of two questions has, up to which they count as the same sentence with something changed."""
_GONE = 2
"""Words of a sum that may be missing where it counts as the same one with something added."""
_UNSAID = frozenset((1.0, 2.0))
"""Numbers that sentences imply: one ticket, both houses."""

Found = tuple[Iterable[object], Iterable[object]] | None
"""What each of the two has that the other should have and has not; None when the guard is silent."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A guard's refusal: its name and what the two questions differ in."""

    guard: str
    first: str
    second: str

    def __str__(self) -> str:
        """As shown in explanations."""
        return f"{self.guard}: {self.first} / {self.second}"


def numbers(a: Facts, b: Facts) -> Found:
    """Each has a number that the other lacks."""
    return _each(a.numbers, b.numbers)


def repeats(a: Facts, b: Facts) -> Found:
    """One of two equal numbers of a sum is another one: $2 for one thing of two has become $3."""
    more, others = a.numbers - b.numbers, b.numbers - a.numbers
    if more and others and (more.keys() - b.numbers.keys() or others.keys() - a.numbers.keys()):
        return tuple(more), tuple(others)
    return None


def givens(a: Facts, b: Facts) -> Found:
    """A sum that leaves out a number which the stored one gives, and does not say it in words.

    The other way round it may be something beside the point, unless nothing but the number was filled in.
    """
    if left_out := _left_out(a, b):
        return (), left_out
    filled_in = _left_out(b, a)
    return (filled_in, ()) if filled_in and _bare(a) == _bare(b) else None


def _left_out(a: Facts, b: Facts) -> tuple[float, ...]:
    """Numbers of `b` that `a` does not say."""
    # In a text that is nearly the same, a word that both have says nothing new.
    near = _near(a, b)
    words = a.words - b.words if near else a.words
    missing = sorted(b.numbers.keys() - a.numbers.keys())
    return tuple(
        number for number in missing if not (SAYS.get(number, frozenset()) & words or (not near and number in _UNSAID))
    )


def _bare(found: Facts) -> list[str]:
    return [word for word in found.sequence if word not in VAGUE and word not in NUMBER_WORDS]


def changes(a: Facts, b: Facts) -> Found:
    """A sum to which something is added that changes an amount: more of it, an extra one, a decrease."""
    for longer, other in ((a, b), (b, a)):
        denied = (longer.negated and not other.negated) or longer.words & DENIALS - other.words
        if not denied and len(other.words - longer.words) <= _GONE and (added := _changing(longer) - _changing(other)):
            return (tuple(added), ()) if longer is a else ((), tuple(added))
    return None


def _changing(found: Facts) -> Counter[str]:
    return Counter(word for word in found.sequence if word in CHANGES)


def units(a: Facts, b: Facts) -> Found:
    """The same number of something else: mg and g, dollars and euros."""
    for value, unit in a.amounts - b.amounts:
        for other, otherwise in b.amounts - a.amounts:
            if value == other and unit != otherwise:
                return (unit,), (otherwise,)
    return None


def dates(a: Facts, b: Facts) -> Found:
    """Each names a year, month, day of the week or relative day that the other does not."""
    return _each(a.times, b.times)


def identifiers(a: Facts, b: Facts) -> Found:
    """Each has an identifier, address or model number that the other lacks."""
    return _each(
        {item for item in a.identifiers if item not in b.low}, {item for item in b.identifiers if item not in a.low}
    )


def names(a: Facts, b: Facts) -> Found:
    """Each has a name that does not occur in the other, not even in another form."""
    return _each(_missing(a.names, b), _missing(b.names, a))


def negation(a: Facts, b: Facts) -> Found:
    """Only one of two like sentences says not."""
    if a.negated == b.negated or not _near(a, b):
        return None
    return (("not",), ()) if a.negated else ((), ("not",))


def opposites(a: Facts, b: Facts) -> Found:
    """In like sentences a word stands against its opposite, or its counterpart."""
    if not _near(a, b):
        return None
    mine, others = a.words - b.words, b.words - a.words
    for word in mine:
        if word in FLIPS and (found := FLIPS[word] & others):
            return (word,), tuple(found)
    return None


def order(a: Facts, b: Facts) -> Found:
    """Words have changed sides: `A to B` against `B to A`, `A is better than B` against `B is better than A`."""
    if not _near(a, b):
        return None
    for word in TURNING_WORDS & a.words & b.words:
        left, right = _sides(a.sequence, word)
        other_left, other_right = _sides(b.sequence, word)
        moved = (left - right) & (other_right - other_left) - SMALL_WORDS
        back = (right - left) & (other_left - other_right) - SMALL_WORDS
        if moved and back:
            return (*sorted(moved), word, *sorted(back)), (*sorted(back), word, *sorted(moved))
    return None


def _sides(words: tuple[str, ...], middle: str) -> tuple[set[str], set[str]]:
    place = words.index(middle)
    return set(words[:place]), set(words[place + 1 :])


def aspects(a: Facts, b: Facts) -> Found:
    """They ask for different things about a subject: its cause, its treatment, its price."""
    if a.aspects and b.aspects and not a.aspects & b.aspects and _near(a, b):
        return tuple(sorted(a.aspects)), tuple(sorted(b.aspects))
    return None


def quotes(a: Facts, b: Facts) -> Found:
    """Each quotes text or code that the other does not have."""
    return _each({q for q in a.quoted if q not in b.low}, {q for q in b.quoted if q not in a.low})


def operators(a: Facts, b: Facts) -> Found:
    """Formulas or code with other operators."""
    if a.operators and b.operators and sorted(a.operators) != sorted(b.operators):
        return a.operators, b.operators
    return None


Guard = Callable[[Facts, Facts], Found]


def _of_sums(guard: Guard) -> Guard:
    """The same, silent unless both texts are sums."""
    return lambda a, b: guard(a, b) if a.reckons and b.reckons else None


GUARDS: Mapping[str, Guard] = {
    "numbers": numbers,
    "repeats": _of_sums(repeats),
    "givens": _of_sums(givens),
    "changes": _of_sums(changes),
    "units": units,
    "dates": dates,
    "identifiers": identifiers,
    "names": names,
    "negation": negation,
    "opposites": opposites,
    "order": order,
    "aspects": aspects,
    "quotes": quotes,
    "operators": operators,
}


def conflict(a: Facts, b: Facts) -> Conflict | None:
    """The first guard's refusal of answering `a` with what answered `b`; None when all are silent."""
    for name, guard in GUARDS.items():
        if (found := guard(a, b)) is not None:
            first, second = (" ".join(str(item) for item in side) or "-" for side in found)
            return Conflict(name, first, second)
    return None


def _near(a: Facts, b: Facts) -> bool:
    return len(a.words ^ b.words) <= _NEAR


def _each(a: Iterable[object], b: Iterable[object]) -> Found:
    """What only one has, if there is something on both sides."""
    mine, others = frozenset(a), frozenset(b)
    only, other = mine - others, others - mine
    return (only, other) if only and other else None


def _missing(found: frozenset[str], other: Facts) -> frozenset[str]:
    """Those that the other text does not have, not even in another form (`Indian` of `India`)."""
    return frozenset(word for word in found if not any(_like(word, known) for known in other.words | other.names))


def _like(word: str, other: str) -> bool:
    """Whether two words differ in up to three letters at the end."""
    return word == other or (
        abs(len(word) - len(other)) <= 3 and word[:5] == other[:5] and min(len(word), len(other)) > 3
    )
