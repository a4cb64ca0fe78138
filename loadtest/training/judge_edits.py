"""Rules that change a question so that the answer must change too, or so that it must not.

The sets have few pairs that share almost every word and differ in what matters; these rules make more of them from the
texts of the training part, anew in every epoch. A rule returns None where it does not apply.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from policies.wordlists import FLIPS, SMALL_WORDS

Rule = Callable[[str, random.Random], str | None]

_WORD = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]+")
_NAME = re.compile(r"(?<=[a-z,;0-9] )(?:[A-Z][\w’'-]+)(?: (?:of the |of )?[A-Z][\w’'-]+)*")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)")
_SMALL = re.compile(r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty)\b", re.I)
_COUNTS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "twenty",
    "thirty",
]
_MANNER = ("half", "twice", "three times", "four times", "five times", "a third", "a quarter")
_MANNERS = re.compile(r"\b(?:" + "|".join(_MANNER) + r")\b", re.I)
_PAIRED = re.compile(r"\b([A-Za-z][\w-]{2,}) (and|or) ([A-Za-z][\w-]{2,})\b")
_FRONT = re.compile(
    r"^((?:In|On|At|After|Before|During|By|From|With|For|Since|Until)\b[^,?]{3,60}?) ?, ([^,]{12,}?)( ?[.?!])?$"
)
_BACK = re.compile(r"^([A-Z].{12,}?) ((?:in|on|at|after|before|during|since|until) [^,.?]{3,40}?)( ?[.?!])?$")
_ASKING = ("how", "why", "when", "where", "who")
_MODAL = re.compile(
    r"\b(is|are|was|were|can|could|should|would|will|do|does|did|has|have|had|may|must)\b(?! not|n't)", re.I
)
_NOT = re.compile(r"\b(?:not |never )|(?<!\bca)(?<!\bwo)n't\b", re.I)
_FRAMES = (
    (
        "what is ",
        ("what does {} mean", "tell me about {}", "explain {}", "define {}", "can you explain {}", "what's {}"),
    ),
    (
        "how do i ",
        ("how can i {}", "how to {}", "what is the way to {}", "how should i {}", "i want to {}, how", "i need to {}"),
    ),
    ("how can i ", ("how do i {}", "how to {}", "what can i do to {}", "how could i {}", "what are ways to {}")),
    ("what are ", ("tell me {}", "list {}", "which are {}", "can you tell me {}", "what're {}")),
    ("should i ", ("is it a good idea to {}", "would it be wise to {}", "do you think i should {}")),
    ("can i ", ("am i able to {}", "is it possible for me to {}", "is it possible to {}", "may i {}")),
)
_TOPICS = (
    "what is {}", "what causes {}", "how is {} treated", "what are the symptoms of {}", "is {} dangerous",
    "how to prevent {}", "what are the benefits of {}", "what are the disadvantages of {}", "when was {} made",
    "who made {}", "how much does {} cost", "where can i find {}", "how does {} work", "how to stop {}",
    "what are examples of {}", "what is the history of {}", "who should not use {}", "is {} free",
)  # fmt: skip
_POLITE = ("please {}", "{} please", "hi, {}", "could you tell me {}", "hello! {}", "{} thanks", "i was wondering, {}",
           "can you help me: {}", "quick question: {}", "just wondering {}", "{} thank you in advance")  # fmt: skip
_LONG = {"what's": "what is", "can't": "cannot", "don't": "do not", "i'm": "i am", "isn't": "is not", "it's": "it is",
         "doesn't": "does not", "won't": "will not", "i've": "i have", "didn't": "did not"}  # fmt: skip
_SHORT = {long: short for short, long in _LONG.items()}


def swap_names(text: str, chance: random.Random) -> str | None:
    """Exchange two names."""
    spans = [found.span() for found in _NAME.finditer(text)]
    if (first := re.match(r"[A-Z][\w-]+(?: [A-Z][\w-]+)*", text)) and first.group().split()[
        0
    ].lower() not in SMALL_WORDS:
        spans.insert(0, first.span())
    return _swap(text, spans, chance)


def swap_heads(text: str, chance: random.Random) -> str | None:
    """Exchange two words that stand alone between small words: mostly nouns of two phrases."""
    return _swap(text, _places(text, head=True), chance)


def swap_attributes(text: str, chance: random.Random) -> str | None:
    """Exchange two words that stand between a small word and another word: mostly attributes."""
    return _swap(text, _places(text, head=False), chance)


def swap_numbers(text: str, chance: random.Random) -> str | None:
    """Exchange two numbers."""
    return _swap(text, [found.span() for found in _NUMBER.finditer(text)], chance)


def change_number(text: str, chance: random.Random) -> str | None:
    """Put another number in the place of one, in digits or a word."""
    spots = [*_NUMBER.finditer(text), *_SMALL.finditer(text), *_MANNERS.finditer(text)]
    if not spots:
        return None
    spot = chance.choice(spots)
    old = spot.group()
    if old.lower() in _COUNTS:
        new = chance.choice([word for word in _COUNTS if word != old.lower()])
    elif old.lower() in _MANNER:
        new = chance.choice([word for word in _MANNER if word != old.lower()])
    else:
        new = _another(old, chance)
    return text[: spot.start()] + new + text[spot.end() :]


def flip(text: str, chance: random.Random) -> str | None:
    """Put the opposite in the place of a word that has one."""
    spots = [found for found in _WORD.finditer(text) if found.group().lower() in FLIPS]
    if not spots:
        return None
    spot = chance.choice(spots)
    return text[: spot.start()] + chance.choice(sorted(FLIPS[spot.group().lower()])) + text[spot.end() :]


def negate(text: str, chance: random.Random) -> str | None:
    """Take a negation out, or put one in."""
    if found := _NOT.search(text):
        return text[: found.start()] + text[found.end() :]
    if not (spots := list(_MODAL.finditer(text))):
        return None
    spot = chance.choice(spots)
    return text[: spot.end()] + chance.choice([" not", "n't", " never"]) + text[spot.end() :]


def ask_otherwise(text: str, chance: random.Random) -> str | None:
    """Begin with another question word."""
    first, _, rest = text.partition(" ")
    if first.lower() not in _ASKING or not rest:
        return None
    return f"{chance.choice([word for word in _ASKING if word != first.lower()])} {rest}"


def drop_detail(text: str, chance: random.Random) -> str | None:
    """Leave out one sentence of several, not the last."""
    parts = re.split(r"(?<=[.?!])\s+", text)
    if len(parts) < 3:
        return None
    del parts[chance.randrange(len(parts) - 1)]
    return " ".join(parts)


def turn_conjuncts(text: str, chance: random.Random) -> str | None:
    """`X and Y` becomes `Y and X`."""
    spots = [
        found
        for found in _PAIRED.finditer(text)
        if found[1].islower() == found[3].islower() and not {found[1].lower(), found[3].lower()} & SMALL_WORDS
    ]
    if not spots:
        return None
    spot = chance.choice(spots)
    return f"{text[: spot.start()]}{spot[3]} {spot[2]} {spot[1]}{text[spot.end() :]}"


def move_phrase(text: str, chance: random.Random) -> str | None:
    """Move a phrase of time or place from the front to the end, or back; questions have another order."""
    if text.endswith("?"):
        return None
    if found := _FRONT.match(text):
        front, rest, end = found[1], found[2], found[3] or ""
        return f"{rest[0].upper()}{rest[1:]} {front[0].lower()}{front[1:]}{end}"
    if (found := _BACK.match(text)) and " and " not in text and re.search(r"\d{4}", found[2]):
        return f"{found[2][0].upper()}{found[2][1:]} , {found[1]}{found[3] or ''}"
    return None


def reframe(text: str, chance: random.Random) -> str | None:
    """Ask the same in another frame."""
    low = text.lower()
    for frame, others in _FRAMES:
        if low.startswith(frame) and len(text) < 120 and text.count("?") <= 1:
            rest = text[len(frame) :].rstrip(" ?.!")
            return chance.choice(others).format(rest) + chance.choice(["?", "", "?"])
    return None


def polite(text: str, chance: random.Random) -> str | None:
    """Wrap into words that ask for nothing."""
    return chance.choice(_POLITE).format(text) if len(text) < 300 else None


def sloppy(text: str, chance: random.Random) -> str | None:
    """Lower case, no punctuation at the end, contractions, one letter lost: what people do to a question."""
    match chance.randrange(4):
        case 0:
            return text.lower()
        case 1:
            return text.rstrip(" ?.!") if text[-1:] in "?.!" else text + "?"
        case 2:
            return _contract(text, chance)
        case _:
            return _misspell(text, chance)


def _contract(text: str, chance: random.Random) -> str | None:
    for table in chance.sample([_LONG, _SHORT], 2):
        for old, new in table.items():
            if found := re.search(rf"\b{old}\b", text, re.I):
                return text[: found.start()] + new + text[found.end() :]
    return None


def _misspell(text: str, chance: random.Random) -> str | None:
    spots = [found for found in re.finditer(r"\b[a-z]{7,}\b", text) if found.group() not in FLIPS]
    if not spots:
        return None
    place = chance.choice(spots).start() + chance.randrange(2, 6)
    return text[:place] + text[place + 1 :]


NEGATIVE: Sequence[Rule] = (
    swap_names, swap_names, swap_heads, swap_heads, swap_attributes, swap_numbers, change_number, change_number, flip,
    flip, negate, ask_otherwise, drop_detail,
)  # fmt: skip
POSITIVE: Sequence[Rule] = (turn_conjuncts, turn_conjuncts, move_phrase, move_phrase, reframe, polite, sloppy)
REORDER_NEGATIVE: Sequence[Rule] = (swap_names, swap_names, swap_heads, swap_attributes)
REORDER_POSITIVE: Sequence[Rule] = (turn_conjuncts, move_phrase)


def other_name(text: str, names: Sequence[str], chance: random.Random) -> str | None:
    """Put another name in the place of one, everywhere it stands."""
    found = [span.group() for span in _NAME.finditer(text)]
    if not found or not names:
        return None
    old, new = chance.choice(found), chance.choice(names)
    return None if new.lower() == old.lower() else text.replace(old, new)


def names_in(text: str) -> list[str]:
    """Names as the rules see them."""
    return [span.group() for span in _NAME.finditer(text)]


def other_topic(text: str, chance: random.Random) -> tuple[str, str] | None:
    """Two different questions about what a short question is about."""
    found = re.match(
        r"(?:what (?:is|are)(?: the)?|what causes|how do i use|how does) ([\w -]{3,50}?)\s*\??$", text, re.I
    )
    if found is None:
        return None
    first, second = chance.sample(_TOPICS, 2)
    return first.format(found[1]) + "?", second.format(found[1]) + "?"


def edited(text: str, rules: Sequence[Rule], chance: random.Random) -> str | None:
    """What the first applicable rule of a shuffled list makes; None when none changes anything."""
    for rule in chance.sample(rules, len(rules)):
        new = rule(text, chance)
        if new is not None and new.split() != text.split():
            return new
    return None


def _another(number: str, chance: random.Random) -> str:
    plain = number.replace(",", "").rstrip(".")
    if "." in plain:
        return f"{float(plain) + chance.choice([-0.5, 0.1, 0.5, 1, 2]):.2f}".rstrip("0").rstrip(".")
    value = int(plain[:18] or "0")
    match chance.randrange(4):
        case 0:
            new = value + chance.choice([1, 2, 3, 5, 10])
        case 1:
            new = value * chance.choice([2, 3, 10, 100])
        case 2:
            new = max(value - chance.choice([1, 2, 3]), 0)
        case _:
            new = chance.randrange(2, max(3 * value, 12))
    return str(new if new != value else value + 1)


def _places(text: str, *, head: bool) -> list[tuple[int, int]]:
    words = list(_WORD.finditer(text))
    spans = []
    for before, word, after in zip(words, words[1:], words[2:], strict=False):
        if not word.group().isalpha() or word.group().lower() in SMALL_WORDS or len(word.group()) < 3:
            continue
        ends = after.group().lower() in SMALL_WORDS or not after.group()[0].isalnum()
        if before.group().lower() in SMALL_WORDS and ends == head:
            spans.append(word.span())
    return spans


def _swap(text: str, spans: list[tuple[int, int]], chance: random.Random) -> str | None:
    if len(spans) < 2:
        return None
    first, second = sorted(chance.sample(spans, 2))
    left, right = text[slice(*first)], text[slice(*second)]
    between = text[first[1] : second[0]].strip().lower()
    if left.lower() == right.lower() or between in {"and", "or", ",", "&", "/"} or first[1] > second[0]:
        return None
    return text[: first[0]] + right + text[first[1] : second[0]] + left + text[second[1] :]
