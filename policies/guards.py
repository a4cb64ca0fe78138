"""Guards: what two questions must not differ in, if one answer is to serve both. A guard can only refuse.

A guard speaks where *each* question has something that the other lacks: two order numbers, two months, a word and its
opposite. Where only one says more, as people do when they rephrase, it is silent, and the pair model decides.
Guards are for what a small model cannot see because it has never seen it: this very number, name or identifier.

A text is looked at once (`facts`, tens of microseconds); comparing two costs a few set operations. Nothing here raises,
whatever the text, and nothing looks further than `MAX_CHARS`: a longer text is refused by the judge before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from policies.wordlists import (
    ASPECT,
    FLIPS,
    LOWER_NAMES,
    NUMBER_WORDS,
    PART_WORDS,
    SMALL_WORDS,
    TIMES,
    TURNING_WORDS,
    UNITS,
)

MAX_CHARS = 8192

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_NUMBER = re.compile(r"(?<![\w.])((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?!/))?)(k\b)?")
_PART = re.compile(r"\b([a-z]+)[ -](" + "|".join(PART_WORDS) + r")s?\b")
_PERCENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?(?:%|percent\b)")
_AMOUNT = re.compile(r"([$€£¥₹₣₩₺₽₿])?\s?(?<![\w.])((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)[\s-]?(%|°[CF]?|[^\W\d_]+)?")
_IDENTIFIER = re.compile(
    r"[\w.+-]+@[\w-]+\.[\w.-]+|https?://\S+|(?=[\w./#-]*\d)(?=[\w./#-]*[A-Za-z_])[\w#][\w./#-]*\w|\b\w+_\w+\b"
)
_MARK = re.compile(r"[\d@_]|://")
_NAME = re.compile(r"[A-Z][\w’'-]*")
_SENTENCE = re.compile(r"(?:^|(?<!mr)(?<!mrs)(?<!ms)(?<!dr)(?<!st)(?<![ .]\w)[.?!:\"“(]\s*|\n\s*)$", re.I)
_QUOTED = re.compile(r"\"([^\"\n]{1,200})\"|“([^”\n]{1,200})”|`([^`\n]{1,200})`|(?<!\w)'([^'\n]{2,200})'(?!\w)")
_FENCED = re.compile(r"```(.*?)```", re.S)
_NEGATION = re.compile(
    r"\b(?:not|never|cannot|without|no longer|neither|nor|nobody|nothing|none|unable|except)\b|n['’]t\b", re.I
)
_NO_NEGATION = re.compile(r"\b(?:or (?:why )?not\b|why not\b|not only\b|not just\b)|whether (?:or not\b)?", re.I)
"""Turns of speech that say not and mean nothing by it."""
_OPERATORS = re.compile(r"(?<=[\w)\s])\s*(<=|>=|==|!=|<|>|\+|\*|\^|(?<=\s)-(?=\s)|÷|×)\s*(?=[\w(\s])")
_NEAR = 8
"""Words that only one of two questions has, up to which they count as the same sentence with something changed."""


Found = tuple[Iterable[object], Iterable[object]] | None
"""What each of the two has that the other should have and has not; None when the guard is silent."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the guards look at in one text."""

    low: str
    """The text in small letters."""
    words: frozenset[str]
    numbers: frozenset[float]
    amounts: frozenset[tuple[float, str]]
    """Numbers with the unit that stands behind or before them."""
    times: frozenset[str]
    """Months, weekdays, years, words like `yesterday`."""
    identifiers: frozenset[str]
    names: frozenset[str]
    quoted: frozenset[str]
    operators: tuple[str, ...]
    negated: bool
    aspects: frozenset[str]
    """What is asked about the subject: cause, cost, symptom..."""
    sequence: tuple[str, ...]
    """All words in their order."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A guard's refusal: its name and what the two questions differ in."""

    guard: str
    first: str
    second: str

    def __str__(self) -> str:
        """As shown in explanations."""
        return f"{self.guard}: {self.first} / {self.second}"


def facts(text: str) -> Facts:
    """Look at a text once; never raises."""
    text = text[:MAX_CHARS]
    low = text.lower().replace("’", "'")
    words = _WORD.findall(low)
    known = frozenset(words)
    marked = _IDENTIFIER.findall(text) if _MARK.search(text) else ()
    return Facts(
        low=low,
        words=known,
        numbers=frozenset(_numbers(low)),
        amounts=frozenset(_amounts(low)),
        times=frozenset(_times(low, known)),
        identifiers=frozenset(found.lower().rstrip(".") for found in marked),
        names=frozenset(_names(text)),
        quoted=frozenset(_quoted(text)),
        operators=tuple(_OPERATORS.findall(low)),
        negated=_NEGATION.search(_NO_NEGATION.sub(" ", low)) is not None,
        aspects=frozenset(found.lastgroup for found in ASPECT.finditer(low) if found.lastgroup),
        sequence=tuple(words),
    )


def _numbers(low: str) -> Iterable[float]:
    """Numbers in digits and words; `three quarters`, `3/4` and `75 %` are one."""
    for count, part in _PART.findall(low):
        if count in NUMBER_WORDS or count in {"a", "one"}:
            yield round(NUMBER_WORDS.get(count, 1) * PART_WORDS[part], 9)
    plain = _PART.sub(_without_part, low)
    for percent in _PERCENT.findall(plain):
        yield round(_value(percent) / 100, 9)
    plain = _PERCENT.sub(" ", plain)
    for found, thousands in _NUMBER.findall(plain):
        yield _value(found) * (1000 if thousands else 1)
    for word in _WORD.findall(plain):
        if word in NUMBER_WORDS:
            yield NUMBER_WORDS[word]


def _without_part(found: re.Match[str]) -> str:
    known = found[1] in NUMBER_WORDS or found[1] in {"a", "one"}
    return " " if known else found[0]


def _value(digits: str) -> float:
    """A number as written; a fraction is divided. Beyond what a float can hold all are the same."""
    above, _, below = digits.replace(",", "").replace(" ", "").partition("/")
    divisor = float(below[:300]) if below else 1.0
    return round(float(above[:300]) / (divisor or 1.0), 9)


def _amounts(low: str) -> Iterable[tuple[float, str]]:
    for sign, digits, word in _AMOUNT.findall(low):
        unit = UNITS.get(sign or word)
        if unit is not None:
            yield _value(digits), unit


def _times(low: str, words: frozenset[str]) -> Iterable[str]:
    yield from words & TIMES
    yield from re.findall(r"\b(?:1[5-9]|20)\d\d\b", low)


def _names(text: str) -> Iterable[str]:
    """Capitalised words that do not begin a sentence. A text all in capitals, or in title case, tells nothing."""
    found = list(_NAME.finditer(text))
    if len(found) > 0.5 * text.count(" ") + 1:
        return
    for name in found:
        word = name.group().lower().replace("’", "'").removesuffix("'s").rstrip("'-")
        if (
            len(word) > 1
            and word not in LOWER_NAMES
            and not _SENTENCE.search(text[max(0, name.start() - 5) : name.start()])
        ):
            yield word


def _quoted(text: str) -> Iterable[str]:
    for parts in _QUOTED.findall(text):
        yield " ".join("".join(parts).lower().split()).strip(" .,?!")
    for code in _FENCED.findall(text):
        yield " ".join(code.split())


def numbers(a: Facts, b: Facts) -> Found:
    """Each has a number that the other lacks."""
    return _each(a.numbers, b.numbers)


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
GUARDS: Mapping[str, Guard] = {
    "numbers": numbers,
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
    """The first guard's refusal, None when all are silent."""
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
