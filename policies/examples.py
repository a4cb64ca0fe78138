"""A near answer as an example for a cheaper model (IC-Cache, arXiv 2501.12689).

What is too far to be served may still show a smaller model how such a question is answered. The example goes in as a
turn of question and answer right before the question itself; the call is the cheaper model's from then on, key and all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExampleRules:
    """Which model gets examples, and how near they must be."""

    model: str
    similarity: float = 0.6
    """Cosine from which an answer that may not be served may be an example."""


def with_example(body: Mapping[str, Any], question: str, answer: str, model: str) -> dict[str, Any] | None:
    """Return a chat body for the cheaper model with the example before its last turn; None if it has no such place."""
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns or not answer.strip():
        return None
    shown = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**body, "model": model, "messages": [*turns[:-1], *shown, turns[-1]]}
