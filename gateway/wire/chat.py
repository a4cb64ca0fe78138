"""Chat completions: deltas to a message and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from gateway.wire import BrokenStream, Verdict
from gateway.wire.merge import TEXT_FIELDS, merge_chunks
from gateway.wire.replay import Envelope, paired, pieces
from gateway.wire.sse import Event
from gateway.wire.verdict import inspect_choices
from policies.reasons import NotStored

_REASONING = ("reasoning_content", "reasoning")
_ANSWERS = ("content", "tool_calls", "function_call", "refusal", "audio", "images")
_CUT = ("function_call", "audio")
_CALLS = ("function", "custom")
_EMPTY: tuple[object, ...] = (None, "", [])
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
# A choice's fields that replay places itself; the others ride on the finish chunk.
_PLACED = frozenset({"index", "message", "logprobs"})


class ChatWire:
    """`/v1/chat/completions`."""

    endpoint = "chat"

    def merge(self, events: Iterable[bytes]) -> dict[str, Any]:
        """See Wire.merge."""
        answer = merge_chunks(events, "chat.completion")
        answer["choices"] = [_with_message(choice) for choice in answer["choices"]]
        return answer

    def inspect(self, answer: dict[str, Any]) -> Verdict:
        """See Wire.inspect. A refusal in words is an answer; a filter's cut is not."""
        return inspect_choices(answer, _message_fault)

    def replay(self, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
        """See Wire.replay."""
        answer = orjson.loads(body)
        envelope = Envelope(answer, "chat.completion.chunk", include_usage=include_usage)
        for place, choice in enumerate(answer["choices"]):
            index = choice.get("index", place)
            blank = {"logprobs": None} if "logprobs" in choice else {}
            for delta, logprobs in _deltas(choice["message"], choice.get("logprobs")):
                chunk = {"index": index, "delta": delta, **blank, "finish_reason": None}
                if logprobs is not None:
                    chunk["logprobs"] = logprobs
                yield envelope.chunk(chunk)
            rest = {name: value for name, value in choice.items() if name not in _PLACED}
            yield envelope.chunk({"index": index, "delta": {}, **blank, **rest})
        yield from envelope.end()


def strip_usage(event: Event) -> bytes | None:
    """Give what a client sees that did not ask for usage: the event's bytes, or None for the usage chunk.

    An empty `choices` alone does not make a usage chunk: one vendor opens the stream with its prompt filter's verdict.
    """
    if _NO_CHOICES.search(event.data) is None:
        return event.raw
    try:
        chunk = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return event.raw
    is_usage = isinstance(chunk, dict) and chunk.get("choices") == [] and bool(chunk.get("usage"))
    return None if is_usage else event.raw


def _with_message(choice: dict[str, Any]) -> dict[str, Any]:
    delta = choice.pop("delta", None)
    if not isinstance(delta, dict):
        raise BrokenStream("a choice has no delta")
    message = {"role": "assistant", "content": None, "refusal": None, **delta}
    if message.get("tool_calls"):
        message["tool_calls"] = [_without_index(call) for call in sorted(message["tool_calls"], key=_index)]
    return {**choice, "message": message}


def _index(call: Any) -> int:
    index = call.get("index", 0) if isinstance(call, dict) else None
    if not isinstance(index, int):
        raise BrokenStream("a tool call has no place")
    return index


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "index"}


def _message_fault(choice: dict[str, Any]) -> NotStored | None:
    message = choice.get("message")
    if not isinstance(message, dict):
        return NotStored.MALFORMED
    return None if any(message.get(name) for name in _ANSWERS) else NotStored.EMPTY


def _deltas(message: dict[str, Any], logprobs: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], Any]]:
    """Cut a message into deltas, each with its log probabilities, in the order in which a model would have said it."""
    head: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    said: dict[str, Any] = {}
    for name, value in message.items():
        (head if name == "role" or value in _EMPTY else said)[name] = value
    if isinstance(said.get("content"), str):
        head["content"] = ""
    yield head, None
    for name in _REASONING:
        yield from (({name: piece}, None) for piece in _texts(said.pop(name, None)))
    for text, part in paired(_texts(said.pop("content", None)), logprobs, _spoken):
        yield ({} if text is None else {"content": text}), part
    yield from (({"refusal": piece}, None) for piece in _texts(said.pop("refusal", None)))
    for place, call in enumerate(said.pop("tool_calls", ())):
        yield from (({"tool_calls": [{"index": place, **part}]}, None) for part in _in_pieces(_without_index(call)))
    for name in _CUT:
        if name in said:
            yield from (({name: part}, None) for part in _in_pieces(said.pop(name)))
    if said:
        yield said, None


def _texts(value: Any) -> list[Any]:
    """Cut what is said: a text into pieces, anything else stays whole."""
    if isinstance(value, str):
        return pieces(value)
    return [] if value is None else [value]


def _spoken(logprobs: dict[str, Any]) -> str:
    return "".join(token["token"] for token in logprobs.get("content") or ())


def _in_pieces(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Cut an object into one without its long texts, then the texts' pieces: name first, arguments after it."""
    head: dict[str, Any] = {}
    tails: list[dict[str, Any]] = []
    for name, value in whole.items():
        if name in _CALLS and isinstance(value, dict):
            head[name], *rest = _in_pieces(value)
            tails += ({name: part} for part in rest)
        elif isinstance(value, str) and name in TEXT_FIELDS:
            head[name] = ""
            tails += ({name: piece} for piece in pieces(value))
        else:
            head[name] = value
    yield head
    yield from tails
