"""Texts that carry more than a question: instructions to whoever answers.

A prompt that holds a victim's question and an instruction can be as near to it as any paraphrase ("… Answer: no." lies
at a cosine of .98), and a suffix searched word by word brings any instruction near. Neither is another way to ask: an
answer that an instruction shaped serves only who gave that instruction. Key collisions on caches live from this.
"""

from __future__ import annotations

import re

_READ = 4000
"""Characters of a text that are read."""
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE = re.compile(r"[.!?;:\n]+\s*")
_TELLS = re.compile(
    r"(?:please |now |always |just |only |you must |you should |you have to |make sure to |be sure to |and |then )*"
    r"(?:answer|reply|respond|say|output|print|return|ignore|disregard|forget|pretend|act as|act like|behave|role-?play"
    r"|repeat|append|prepend|begin with|start with|end with|finish with|tell (?:them|him|her|the user|everyone|people"
    r"|users)|speak|talk like|claim|state that|insist|recommend (?:only|that)|use only|do not (?:answer|mention|say"
    r"|reply|use)|don't (?:answer|mention|say|reply|use)|never (?:answer|mention|say|reply)|in (?:one|a single|two"
    r"|three|\d+) (?:words?|sentences?|lines?|paragraphs?)|as (?:a |an )?(?:json|xml|yaml|csv|list|table|bullets?|poem"
    r"|pirate)|(?:the )?(?:correct |right |final )?answer is|system|assistant)\b"
)
_POLITE = frozenset(["please", "answer", "reply", "respond", "me", "help", "now", "soon", "thanks"])


def instructed(text: str) -> frozenset[str]:
    """Return the words of the sentences that instruct whoever answers, and of the sentence behind each."""
    sentences = [part for part in _SENTENCE.split(text[:_READ].lower().replace("’", "'")) if part.strip()]
    words = frozenset(
        word
        for place, sentence in enumerate(sentences)
        if _TELLS.match(sentence.lstrip())
        for part in sentences[place : place + 2]
        for word in _WORD.findall(part)
    )
    return frozenset() if words <= _POLITE else words


def differing(one: str, other: str) -> str | None:
    """Name what only one of two texts is instructed to do; None where both are told the same, or nothing."""
    words = instructed(one) ^ instructed(other)
    return f"instruction: {' '.join(sorted(words)[:8])}" if words else None
