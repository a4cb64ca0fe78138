"""Completions: text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from gateway.wire import Verdict
from gateway.wire.merge import merge_chunks
from gateway.wire.replay import Envelope, paired, pieces
from gateway.wire.verdict import inspect_choices
from policies.reasons import NotStored

_PLACED = frozenset({"finish_reason", "index", "logprobs", "text"})


class CompletionsWire:
    """`/v1/completions`."""

    endpoint = "completions"

    def merge(self, events: Iterable[bytes]) -> dict[str, Any]:
        """See Wire.merge."""
        answer = merge_chunks(events, "text_completion")
        answer["choices"] = [{"text": "", "logprobs": None, **choice} for choice in answer["choices"]]
        return answer

    def inspect(self, answer: dict[str, Any]) -> Verdict:
        """See Wire.inspect."""
        return inspect_choices(answer, _text_fault)

    def replay(self, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
        """See Wire.replay."""
        answer = orjson.loads(body)
        envelope = Envelope(answer, "text_completion", include_usage=include_usage)
        for place, choice in enumerate(answer["choices"]):
            index = choice.get("index", place)
            for text, part in paired(pieces(choice["text"]), choice.get("logprobs"), _spoken):
                yield envelope.chunk({"index": index, "text": text or "", "logprobs": part, "finish_reason": None})
            rest = {name: value for name, value in choice.items() if name not in _PLACED}
            finish = {"index": index, "text": "", "logprobs": None, "finish_reason": choice["finish_reason"]}
            yield envelope.chunk(finish | rest)
        yield from envelope.end()


def _spoken(logprobs: dict[str, Any]) -> str:
    return "".join(logprobs.get("tokens") or ())


def _text_fault(choice: dict[str, Any]) -> NotStored | None:
    text = choice.get("text")
    if not isinstance(text, str):
        return NotStored.MALFORMED
    return None if text else NotStored.EMPTY
