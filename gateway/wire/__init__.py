"""The shapes of the cached endpoints: one answer, readable as JSON and as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from policies.reasons import NotStored


class BrokenStream(Exception):
    """The events do not add up to a complete answer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What admission needs to know of an answer."""

    refusal: NotStored | None
    """Why this answer must not be kept; None when it is whole."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Wire(Protocol):
    """One endpoint's shapes."""

    endpoint: str

    def merge(self, events: Iterable[bytes]) -> dict[str, Any]:
        """Add up the `data:` payloads of a finished stream to the answer a non-streaming call would have got.

        Raises BrokenStream.
        """
        ...

    def inspect(self, answer: dict[str, Any]) -> Verdict:
        """Say whether a complete answer is whole: finish reasons, errors, filters, emptiness."""
        ...

    def replay(self, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
        """Read a stored answer as a stream: whole server-sent events, `data: [DONE]` where the endpoint has it."""
        ...
