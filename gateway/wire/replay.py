"""Reading a stored answer of chat or completions as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import orjson

from gateway.wire.sse import DONE, encode

PIECE = 4096
"""Characters of text in one event. Some clients read lines of at most 64 KiB, and JSON may write six bytes for one
character."""

_TOKENS = 16
"""Tokens' log probabilities in one event: each may have twenty alternatives of about eighty bytes."""

_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint", "service_tier")


class Envelope:
    """What the chunks of one replay have in common."""

    def __init__(self, answer: dict[str, Any], kind: str, *, include_usage: bool) -> None:
        self._common = {"id": "", "object": kind, "created": 0, "model": ""}
        self._common |= {name: answer[name] for name in _ENVELOPE if name in answer and name != "object"}
        self._usage = answer.get("usage") if include_usage else None
        if self._usage is not None:
            self._common["usage"] = None
        placed = (*_ENVELOPE, "choices", "usage")
        # What else the backend said of the whole answer is told once.
        self._once = {name: value for name, value in answer.items() if name not in placed}

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """Write the event of one choice's chunk."""
        once, self._once = self._once, {}
        return encode(orjson.dumps({**self._common, "choices": [choice], **once}))

    def end(self) -> Iterator[bytes]:
        """Write the usage chunk, if it was asked for and is known, and the end of the stream."""
        if self._usage is not None:
            yield encode(orjson.dumps({**self._common, "choices": [], "usage": self._usage}))
        yield encode(DONE)


def pieces(text: str) -> list[str]:
    """Cut a text into pieces of at most PIECE characters; none for an empty text."""
    if len(text) <= PIECE:
        return [text] if text else []
    return [text[at : at + PIECE] for at in range(0, len(text), PIECE)]


def paired(
    texts: list[Any], logprobs: dict[str, Any] | None, spoken: Callable[[dict[str, Any]], str]
) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Give the pieces of a text with the log probabilities of its tokens beside them, None where one has run out.

    Where the tokens spell the text (stop sequences and torn characters make exceptions) it is cut between them.
    """
    parts = _fragments(logprobs)
    spelled = [spoken(part) for part in parts]
    if texts and "".join(spelled) == "".join(map(str, texts)):
        texts = spelled
    return zip_longest(texts, parts)


def _fragments(logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Cut log probabilities into objects of the same shape with a few tokens each, which add up to the whole."""
    if logprobs is None:
        return []
    longest = max((len(value) for value in logprobs.values() if isinstance(value, list)), default=0)
    return [
        {
            name: value[at : at + _TOKENS] if isinstance(value, list) else value
            for name, value in logprobs.items()
            if at == 0 or value is None or isinstance(value, list)
        }
        for at in range(0, max(longest, 1), _TOKENS)
    ]
