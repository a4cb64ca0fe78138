"""Last turns that mean nothing, or something else, without what went before them: those are kept exact.

Two calls with equal earlier turns share a scope, and so do all first turns. There "and in Germany?", "continue" or "the
second one" look alike whatever they refer to; a tool's result looks like the result of the step before. No similarity
can tell, so such calls are answered from the exact key or not at all. The lists are short and lean to caution: a missed
hit costs a call, a wrong one an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Leaning(StrEnum):
    """Why a last turn is kept exact."""

    CONTINUATION = "continuation"
    """Asks for more, or only agrees: "continue", "yes please"."""
    ELLIPSIS = "ellipsis"
    """A fragment that borrows its verb: "and in Germany?"."""
    REFERENCE = "reference"
    """Points at something that was said: "the second one", "why is that?"."""
    TOOL_RESULT = "tool-result"
    """What a program printed."""
    TRANSCRIPT = "transcript"
    """A whole conversation in one text."""
    LOOP = "loop"
    """A step of an agent: tools were called in an earlier turn."""
    LONG = "long"
    """Too long to be one question."""


@dataclass(frozen=True, slots=True)
class ContextRules:
    """How last turns are looked at."""

    longest: int = 4000
    """Characters beyond which a text is taken for a document rather than a question."""


def leaning(text: str, *, first: bool, rules: ContextRules = ContextRules()) -> Leaning | None:
    """Say why the last turn is kept exact; None if it can be understood alone.

    `first` says that no user or assistant turn precedes it: then a bare noun is a question of its own.
    """
    if len(text) > rules.longest:
        return Leaning.LONG
    if _printed(text):
        return Leaning.TOOL_RESULT
    if len(_SPEAKER.findall(text)) >= 2:
        return Leaning.TRANSCRIPT
    words = _WORD.findall(text.lower().replace("’", "'"))
    if not words or _continues(words, text):
        return Leaning.CONTINUATION
    if _fragment(words, first):
        return Leaning.ELLIPSIS
    if _points_back(words) or _dangling(words, first):
        return Leaning.REFERENCE
    return None


def in_loop(endpoint: str, fields: Mapping[str, Any]) -> bool:
    """Whether a chat or responses body is a step of an agent: an earlier turn called a tool or carries its result."""
    turns = fields.get("messages" if endpoint == "chat" else "input")
    return isinstance(turns, list) and any(isinstance(turn, dict) and _tool_turn(turn) for turn in turns)


def first_turn(endpoint: str, fields: Mapping[str, Any]) -> bool:
    """Whether nothing but instructions precedes the last turn."""
    turns = fields.get("messages" if endpoint == "chat" else "input")
    if not isinstance(turns, list):
        return True
    return all(isinstance(turn, dict) and turn.get("role") in ("system", "developer") for turn in turns[:-1])


def kept_exact(
    endpoint: str, fields: Mapping[str, Any], text: str, rules: ContextRules = ContextRules()
) -> Leaning | None:
    """Say why a call whose last user text is `text` is not compared by meaning; None if it may be."""
    if in_loop(endpoint, fields):
        return Leaning.LOOP
    return leaning(text, first=first_turn(endpoint, fields), rules=rules)


def _tool_turn(turn: Mapping[str, Any]) -> bool:
    return (
        turn.get("role") in ("tool", "function")
        or bool(turn.get("tool_calls"))
        or bool(turn.get("function_call"))
        or turn.get("type") in _TOOL_ITEMS
    )


_TOOL_ITEMS = frozenset({"function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"})

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_SPEAKER = re.compile(r"^\s*(?:user|assistant|human|ai|system|tool)\s*:", re.I | re.M)
_PRINTED = re.compile(
    r"<(?:returncode|exit_?code|output|stdout|stderr|observation|tool_result|tool_response|function_results?)\b"
    r"|^\s*(?:observation|tool (?:output|result|response)|command output|stdout|stderr|exit code|return ?code)\s*:"
    r"|^Traceback \(most recent call last\)",
    re.I | re.M,
)


def _printed(text: str) -> bool:
    stripped = text.strip()
    # A bare JSON value is what programs exchange, not what people ask.
    return (stripped[:1], stripped[-1:]) in (("{", "}"), ("[", "]")) or _PRINTED.search(text) is not None


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MORE = _words(
    # What asks for more of the same or only answers, in the languages where a word list is enough.
    "continue proceed resume next more again retry further elaborate explain simplify shorter longer rephrase "
    "yes no yeah yep nope ok okay sure right correct exactly please thanks thank you go on ahead keep going carry try "
    "it do that this stop wait hmm really why how what so and then else anything something now just good great nice "
    "weiter mach fortfahren ja nein danke bitte gerne warum wieso genau noch mal nochmal "
    "continuez continuer oui non merci encore pourquoi d'accord vas y s'il te vous plaît "
    "continúa continua continuar sigue sí si gracias vale por favor más otra vez "
    "avanti sì grazie ancora perché sim não obrigado mais "
    "продолжай продолжи продолжить дальше ещё еще да нет спасибо почему "
    "继续 好 好的 是 是的 不 不是 谢谢 请继续 接着说 为什么 続けて 続き はい いいえ お願いします ありがとう なぜ "
    "계속 네 아니요 계속해 चालू हाँ नहीं استمر نعم لا"
)
_LONGEST_MORE = 5
_CHOICE = re.compile(r"\W*(?:(?:option|number|no|nr|step|part|point|choice|answer)\W*)?(?:[a-e]|\d{1,3})\W*", re.I)


def _continues(words: list[str], text: str) -> bool:
    if len(words) <= _LONGEST_MORE and all(word in _MORE for word in words):
        return True
    return _CHOICE.fullmatch(text) is not None


_BORROWING = re.compile(
    r"(?:and|but|or|also|plus|then|und|aber|oder|et|mais|ou|y|pero|o|e|ma|и|а|но|или)\b"
    r"|(?:what|how) about\b|(?:was ist|wie ist es|wie sieht es|wie steht es) mit\b|et (?:pour|si)\b|qu'en est il\b"
    r"|(?:qué|que) (?:tal|hay de)\b|(?:same|likewise|instead|except|only)\b|which one\b"
    r"|(?:for|in|with|without|using|from|to|at|on) (?:\w+ ){0,3}\w+$"
)
_LONGEST_FRAGMENT = 8
_LONGEST_POINTING = 16
"""Words up to which "the second one" or "your answer" is taken to mean something outside the text."""
_LONGEST_DANGLING = {True: 8, False: 14}
"""Words up to which a pronoun may lack what it stands for, by whether the turn is the first: longer texts bring it with
them, and a first turn has nothing else to lean on."""
_CJK_BORROWING = re.compile(r"(?:那么?|那|还有|では|じゃあ|それで|그럼|그리고)")


def _fragment(words: list[str], first: bool) -> bool:
    if _CJK_BORROWING.match(words[0]):
        return True
    if len(words) <= _LONGEST_FRAGMENT and _BORROWING.match(" ".join(words)):
        return True
    return not first and len(words) <= 3


_POINTER = re.compile(
    r"\bthe (?:first|second|third|fourth|fifth|last|previous|next|other|same|former|latter|above|earlier|final) ones?\b"
    r"|\b(?:the|your|that|this|my) (?:previous|last|above|earlier|preceding) "
    r"(?:answer|reply|response|message|question|code|example|step|point|list|text|paragraph|prompt|output|version)\b"
    r"|\byour (?:answer|reply|response|suggestion|code|example|explanation)\b"
    r"|\byou (?:just|already)? ?(?:said|mentioned|wrote|gave|suggested|told me|listed|described|provided|showed)\b"
    r"|\b(?:mentioned|listed|described|shown|stated|given|as|like|see) (?:above|earlier|before|previously)\b"
    r"|\b(?:from|in) (?:above|before)$|\bthe (?:latter|former)\b|\bthe rest$"
    r"|\b(?:option|number|point|step|item|example|question|part) (?:\d{1,2}|one|two|three)$"
    r"|\b(?:do|say|write|explain|summari[sz]e|translate|fix|rewrite|shorten|improve) "
    r"(?:it|this|that|them|these|those)\b"
    r"|\b(?:die|der|das) (?:erste|zweite|dritte|letzte|vorige|obige)n?$"
    r"|\b(?:le|la) (?:premier|première|deuxième|second|dernier|dernière)e?$"
    r"|\b(?:el|la) (?:primer[oa]|segund[oa]|tercer[oa]|últim[oa])$"
)

_REVISING = re.compile(
    r"\b(?:review|correct|fix|check|revise|redo|repeat|reformat|try) your (?:\w+ )?"
    r"(?:output|answer|reply|response|action|command|format)s?\b"
)
"""Asks for another try at what was answered, however long the complaint is."""

_ANAPHOR = _words("it its they them their theirs he him his she her hers these those itself themselves")
_DETERMINER = _words(
    "a an the my your our his her their some any every each all both no which what's whose many most two three"
)
_EMPTY = _words(
    "what when where why how who whom which is are was were be been am do does did can could will would shall should "
    "may might must has have had i you we me us to of in on at by for with from about as if or and but so not it "
    "there here than then that this"
)
_THIN = _words(
    "old tall big long far much many more less good bad explain summarize summarise translate fix rewrite rephrase "
    "shorten improve describe tell show give say write make mean work works happen use need know think get go come "
    "please just also really again please exactly still even only first"
)
"""Words of substance that no pronoun stands for."""
_IMPERSONAL = re.compile(
    r"\bit'?s? (?:is |was |be |being |would be |will be )?"
    r"(?:ok|okay|possible|impossible|safe|legal|illegal|true|better|worth|bad|good|normal|necessary|hard|easy|difficult"
    r"|right|wrong|common|healthy|important|like|rain|raining|takes?|costs?|feel|mean|called|too late|compulsory"
    r"|mandatory|time|that|when|if)\b"
    r"|\b(?:make|made|take|get|have|believe|like|love|hate) it\b|\btime is it\b|\bit (?:\w+ ){1,3}to \w+ \w+"
)
_POINTING = re.compile(
    r"(?:^|\b(?:is|was|does|do|did|of|about|with|for|like|by|after|before|to|mean|say|in|on|explain|why) )"
    r"(?P<it>this|that)(?:$| (?:is|was|mean|means|does|do|did|doesn't|work|works|so|too|then|to|in|for)\b)"
)


def _points_back(words: list[str]) -> bool:
    """Whether a text speaks of what was said before; most that a long one speaks of it has said itself."""
    joined = " ".join(words)
    if _REVISING.search(joined):
        return True
    return len(words) <= _LONGEST_POINTING and _POINTER.search(joined) is not None


def _dangling(words: list[str], first: bool) -> bool:
    """Whether a pronoun comes before anything that it could stand for."""
    if len(words) > _LONGEST_DANGLING[first]:
        return False
    joined = " ".join(words)
    pointing = _POINTING.search(joined)
    places = [place for place, word in enumerate(words) if word in _ANAPHOR][:1]
    if pointing is not None:
        places.append(joined.count(" ", 0, pointing.start("it")))
    if not places:
        return False
    place = min(places)
    before = words[:place]
    if any(word in _DETERMINER or word not in _EMPTY | _THIN for word in before):
        return False
    return words[place] != "it" or _IMPERSONAL.search(" ".join(words[max(0, place - 2) :])) is None
