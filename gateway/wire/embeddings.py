"""Embeddings: vectors as numbers or as base64, never streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gateway.wire import BrokenStream, Verdict
from gateway.wire.verdict import counted
from policies.reasons import NotStored


class EmbeddingsWire:
    """`/v1/embeddings`."""

    endpoint = "embeddings"

    def merge(self, events: Iterable[bytes]) -> dict[str, Any]:
        """Always raise BrokenStream: a backend that streams vectors is not understood."""
        raise BrokenStream("embeddings have no stream")

    def inspect(self, answer: dict[str, Any]) -> Verdict:
        """See Wire.inspect."""
        return counted(answer, _refusal(answer), "prompt_tokens", "completion_tokens")

    def replay(self, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
        """Always raise BrokenStream: a stored answer is served as it is, whatever the call said of streaming."""
        raise BrokenStream("embeddings have no stream")


def _refusal(answer: Any) -> NotStored | None:
    if not isinstance(answer, dict):
        return NotStored.MALFORMED
    if answer.get("error"):
        return NotStored.ERROR_STATUS
    data = answer.get("data")
    if not isinstance(data, list):
        return NotStored.MALFORMED
    if not data:
        return NotStored.EMPTY
    faults = (_item_fault(item) for item in data)
    return next((fault for fault in faults if fault is not None), None)


def _item_fault(item: Any) -> NotStored | None:
    embedding = item.get("embedding") if isinstance(item, dict) else None
    if not isinstance(embedding, list | str):
        return NotStored.MALFORMED
    if not embedding:
        return NotStored.EMPTY
    # A backend whose vector holds a NaN writes null: not a vector to remember.
    whole = isinstance(embedding, str) or set(map(type, embedding)) <= {float, int}
    return None if whole else NotStored.MALFORMED
