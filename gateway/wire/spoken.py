"""What a model said: the texts of an answer, without its envelope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

_SAID = frozenset({"content", "refusal", "reasoning_content", "text", "arguments", "name", "summary"})
"""Fields below a choice or an output item whose strings are the model's own."""


def spoken(endpoint: str, answer: dict[str, Any]) -> str:
    """Return all that a whole answer says, choice by choice; vectors are said as they are."""
    match endpoint:
        case "embeddings":
            return orjson.dumps(answer.get("data")).decode()
        case "responses":
            return "\n".join(_texts(answer.get("output"), said=False))
        case _:
            return "\n".join(_texts(answer.get("choices"), said=False))


def _texts(value: Any, *, said: bool) -> Iterator[str]:
    match value:
        case str() if said:
            yield value
        case list():
            for item in value:
                yield from _texts(item, said=said)
        case dict():
            for name, item in value.items():
                # A text below a field of the envelope (an id, a role, a finish reason) was not said by the model.
                if not isinstance(item, str) or name in _SAID:
                    yield from _texts(item, said=True)


def strings(value: Any) -> Iterator[str]:
    """Yield every string value of a request's fields, in order."""
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from strings(item)
        case dict():
            for item in value.values():
                yield from strings(item)
