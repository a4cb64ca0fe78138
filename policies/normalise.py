"""Normal forms: two questions that differ only in how they are typed have the same one.

What is dropped asks for nothing: case, accents of width, spacing, punctuation that carries no meaning, greetings and
thanks. What could change an answer stays: digits with their signs and points, operators, quoted text, code.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CHARS = 4096
"""A longer text has only itself as its normal form; it is not worth the time, and equal texts are exact hits anyway."""
_REMEMBERED = 256
"""Forms that are kept, 8 MB at the most: a look-up asks for that of the same question a dozen times."""

_QUOTES = str.maketrans("‘’‚‛ʼ`´“”„‟«»‐‑‒–—−", "'''''''\"\"\"\"\"\"------")
_CONTRACTIONS = {
    "what's": "what is", "who's": "who is", "where's": "where is", "how's": "how is", "when's": "when is",
    "that's": "that is", "there's": "there is", "it's": "it is", "he's": "he is", "she's": "she is", "let's": "let us",
    "i'm": "i am", "you're": "you are", "we're": "we are", "they're": "they are", "i've": "i have",
    "you've": "you have", "we've": "we have", "they've": "they have", "i'll": "i will", "you'll": "you will",
    "we'll": "we will", "they'll": "they will", "i'd": "i would", "you'd": "you would", "can't": "can not",
    "cannot": "can not", "won't": "will not", "shan't": "shall not", "don't": "do not", "doesn't": "does not",
    "didn't": "did not", "isn't": "is not", "aren't": "are not", "wasn't": "was not", "weren't": "were not",
    "haven't": "have not", "hasn't": "has not", "hadn't": "had not", "wouldn't": "would not",
    "couldn't": "could not", "shouldn't": "should not", "mustn't": "must not", "needn't": "need not",
    "whats": "what is", "dont": "do not", "doesnt": "does not", "didnt": "did not", "isnt": "is not",
    "cant": "can not", "wont": "will not", "im": "i am", "ive": "i have",
}  # fmt: skip
_OPENING = (
    "hi there", "hello there", "hey there", "hi", "hey", "good morning", "good afternoon", "good evening",
    "excuse me", "quick question", "just wondering", "i was wondering", "i am wondering", "so", "ok", "okay", "well",
    "um", "uh", "please", "kindly", "could you please tell me", "could you tell me", "can you please tell me",
    "can you tell me", "would you tell me", "please tell me", "do you know", "i would like to know",
    "i want to know", "i need to know", "may i ask", "can i ask", "could i ask", "can you help me",
    "could you help me",
)  # fmt: skip
_CLOSING = (
    "please", "pls", "plz", "thanks in advance", "thank you in advance", "thank you very much", "thank you so much",
    "many thanks", "thank you", "thanks a lot", "thanks", "thx", "cheers",
)  # fmt: skip
# Longest first, so that a phrase goes before its beginning does. "Hello world" is no greeting, "Hello, world" is.
_BEFORE = re.compile(
    r"(?:(?:" + "|".join(sorted(_OPENING, key=len, reverse=True)) + r")\b[ ,:;.!-]*|hello[,:;.!-][ ,:;.!-]*)(?=\S)"
)
_BEHIND = re.compile(r"[ ,;.!?-](?:" + "|".join(sorted(_CLOSING, key=len, reverse=True)) + r")[ .!?]*$")
_REACH = 48
"""Characters at the end in which thanks are looked for."""
_APOSTROPHED = re.compile(r"[a-z]+'[a-z]+|\b(?:cannot|whats|dont|doesnt|didnt|isnt|cant|wont|im|ive)\b")
_CODE = re.compile(r"```|`[^`\n]+`|[{}<>=;\\]|\w\(|\w\.\w+\(|^\s*(?:def|class|import|SELECT|function)\b", re.M)
# What stays: a point or comma within a number or a name (3.5, node.js), hyphens and apostrophes within words.
_IDLE = re.compile(r"[.,](?=\s|$)|[?!;:…。、，？！¿¡]|(?<!\w)'(?=\w)|(?<=\w)'(?!\w)|(?<!\S)-(?!\S)")
_ACRONYMS = re.compile(r"\b(?:US|IT|WHO|AIDS|SAT|ACT|CAN|AM|PM|IN|OR|ME|OK|HE|AN|AS|BE|DO|GO|SO|TO|UP|WE|NO|ON)\b")
"""In capitals these are other words than in small letters."""
_SPACE = re.compile(r"\s+")


def normal(text: str) -> str:
    """Return the normal form; never raises, whatever the text."""
    return text if len(text) > MAX_CHARS else _normal(text)


@lru_cache(_REMEMBERED)
def _normal(text: str) -> str:
    if _CODE.search(text):
        return _SPACE.sub(" ", text).strip()
    plain = _folded(text)
    plain = _APOSTROPHED.sub(_long, plain)
    plain = _without_courtesy(plain)
    if '"' not in plain:  # what is quoted may differ by nothing but a point
        plain = _IDLE.sub(" ", plain)
    return _SPACE.sub(" ", plain).strip() or _SPACE.sub(" ", text).strip()


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    kept = {found.start() for found in _ACRONYMS.finditer(folded)}
    low = folded.lower()
    if kept and len(low) == len(folded):
        for start in kept:
            low = f"{low[:start]}{folded[start]}{low[start + 1 :]}"
    return _SPACE.sub(" ", low).strip()


def _long(found: re.Match[str]) -> str:
    return _CONTRACTIONS.get(found.group(), found.group())


def _without_courtesy(text: str) -> str:
    """Greetings and thanks off both ends, several of them, as long as something is left."""
    while True:
        shorter = text
        if found := _BEFORE.match(shorter):
            shorter = shorter[found.end() :]
        if found := _BEHIND.search(shorter, max(1, len(shorter) - _REACH)):
            shorter = shorter[: found.start()]
        if shorter == text or not shorter.strip():
            return text
        text = shorter
