"""A replay at a pace: the texts of its events cut small, for clients that show an answer as it is being written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.wire.sse import DONE, SseParser, encode

_CHARACTERS = 4.0
"""Of a token, about."""
_INTERVAL = 0.05
"""Seconds between two events, unless a single character takes longer."""
_LARGEST = 2**26


@dataclass(frozen=True, slots=True)
class Pace:
    """How much text goes out how often."""

    size: int
    """Characters in one event at most."""
    interval: float
    """Seconds from one event to the next."""

    @classmethod
    def of(cls, tokens: float) -> Pace:
        """Return the pace of so many tokens per second."""
        size = max(1, round(_CHARACTERS * tokens * _INTERVAL))
        return cls(size, size / (_CHARACTERS * tokens))


def cut(replay: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Cut the events of a replay so that each has at most `size` characters of text; the sum stays the same."""
    parser = SseParser(_LARGEST)
    number = 0
    for raw in replay:
        for event in parser.feed(raw):
            if event.data == DONE:
                yield event.raw
                continue
            for part in _parts(orjson.loads(event.data), size):
                if "sequence_number" in part:
                    part["sequence_number"] = number
                number += 1
                yield encode(orjson.dumps(part), event.event or None)


def _parts(payload: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Cut one event's payload at its one long text, if it has one that can be cut."""
    match payload:
        case {"choices": [{"logprobs": dict()}]}:
            yield payload
        case {"choices": [{"delta": {"content": str(text)} as delta} as choice]}:
            for piece in _pieces(text, size):
                yield {**payload, "choices": [{**choice, "delta": {**delta, "content": piece}}]}
        case {"choices": [{"text": str(text)} as choice]}:
            for piece in _pieces(text, size):
                yield {**payload, "choices": [{**choice, "text": piece}]}
        case {"type": str(), "delta": str(text)}:
            for piece in _pieces(text, size):
                yield {**payload, "delta": piece}
        case _:
            yield payload


def _pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, max(1, len(text)), size)]
