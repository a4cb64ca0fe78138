"""What a text says that guards look at: its numbers, names, dates, units, and what it asks for.

A text is looked at once (`facts`, tens of microseconds). Nothing here raises, whatever the text, and nothing looks
further than `MAX_CHARS`: a longer text is refused by the judge before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from policies.wordlists import ASPECT, LOWER_NAMES, NUMBER_WORDS, PART_WORDS, TIMES, UNITS

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
_MANY = re.compile(r"\bhow (?:many|much)\b|\bcalculat|\btotal\b|\baverage\b")
_QUANTITY = re.compile(
    r"\bhow (?:long|far|old|tall|high|big|fast|heavy|wide|deep)\b|\bcombined\b|\bsum\b|\bpercentage\b|\bfind\b"
    r"|\bwhat (?:is|was|will|would)\b"
)
_FRACTIONS = {
    ord(sign): f" {part}" for sign, part in (("½", "1/2"), ("⅓", "1/3"), ("⅔", "2/3"), ("¼", "1/4"), ("¾", "3/4"))
}
_OPERATORS = re.compile(r"(?<=[\w)\s])\s*(<=|>=|==|!=|<|>|\+|\*|\^|(?<=\s)-(?=\s)|÷|×)\s*(?=[\w(\s])")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the guards look at in one text."""

    low: str
    """The text in small letters."""
    words: frozenset[str]
    numbers: Counter[float]
    """How often each stands there, in digits or words."""
    amounts: frozenset[tuple[float, str]]
    """Numbers with the unit that stands behind or before them."""
    times: frozenset[str]
    """Months, weekdays, years, words like `yesterday`."""
    identifiers: frozenset[str]
    names: frozenset[str]
    quoted: frozenset[str]
    operators: tuple[str, ...]
    negated: bool
    reckons: bool
    """It gives numbers and asks for a quantity: a sum."""
    aspects: frozenset[str]
    """What is asked about the subject: cause, cost, symptom..."""
    sequence: tuple[str, ...]
    """All words in their order."""


def facts(text: str) -> Facts:
    """Look at a text once; never raises."""
    text = text[:MAX_CHARS]
    low = text.lower().replace("’", "'")
    words = _WORD.findall(low)
    counted = Counter(_numbers(low.translate(_FRACTIONS)))
    known = frozenset(words)
    marked = _IDENTIFIER.findall(text) if _MARK.search(text) else ()
    return Facts(
        low=low,
        words=known,
        numbers=counted,
        amounts=frozenset(_amounts(low)),
        times=frozenset(_times(low, known)),
        identifiers=frozenset(found.lower().rstrip(".") for found in marked),
        names=frozenset(_names(text)),
        quoted=frozenset(_quoted(text)),
        operators=tuple(_OPERATORS.findall(low)),
        negated=_NEGATION.search(_NO_NEGATION.sub(" ", low)) is not None,
        reckons=_reckons(low, len(counted)),
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


def _reckons(low: str, numbers: int) -> bool:
    """Whether a quantity is asked for; where the words for it have other uses too, two numbers must stand there."""
    return (numbers > 0 and _MANY.search(low) is not None) or (numbers > 1 and _QUANTITY.search(low) is not None)


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
