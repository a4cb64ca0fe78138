"""Responses: typed events around one growing object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from gateway.wire import BrokenStream, Verdict
from gateway.wire.merge import payloads
from gateway.wire.replay import pieces
from gateway.wire.sse import encode
from gateway.wire.verdict import counted, unwritable
from policies.reasons import NotStored

_FINAL = frozenset({"response.completed", "response.failed", "response.incomplete"})

# Items whose one long text is told in pieces: type -> (field, name of the events).
_ITEM_TEXTS = {
    "function_call": ("arguments", "function_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
    "mcp_call": ("arguments", "mcp_call_arguments"),
    "code_interpreter_call": ("code", "code_interpreter_call_code"),
}
# The same for the parts of a message's or a reasoning item's content.
_PART_TEXTS = {
    "output_text": ("text", "output_text"),
    "refusal": ("refusal", "refusal"),
    "reasoning_text": ("text", "reasoning_text"),
}


class ResponsesWire:
    """`/v1/responses`."""

    endpoint = "responses"

    def merge(self, events: Iterable[bytes]) -> dict[str, Any]:
        """See Wire.merge. The last event has it all; what is incomplete or failed is inspect's to refuse."""
        items: dict[int, dict[str, Any]] = {}
        for payload in payloads(events):
            kind = payload.get("type")
            if kind == "error":
                raise BrokenStream(f"the stream tells an error: {str(payload.get('message'))[:200]}")
            if kind == "response.output_item.done" and isinstance(payload.get("item"), dict):
                items[_place(payload, len(items))] = payload["item"]
            if kind in _FINAL:
                return _final(payload.get("response"), items)
        raise BrokenStream("no event ends the response")

    def inspect(self, answer: dict[str, Any]) -> Verdict:
        """See Wire.inspect. A refusal in words is an answer; a filter's cut is not."""
        return counted(answer, _refusal(answer), "input_tokens", "output_tokens")

    def replay(self, body: bytes, *, include_usage: bool) -> Iterator[bytes]:
        """See Wire.replay. Usage is part of the response, and so always told."""
        response = orjson.loads(body)
        begun = {**response, "status": "in_progress", "output": [], "usage": None}
        if "completed_at" in begun:
            begun["completed_at"] = None
        for number, event in enumerate(_events(response, begun)):
            yield encode(orjson.dumps({**event, "sequence_number": number}), event["type"])


def _place(payload: dict[str, Any], otherwise: int) -> int:
    index = payload.get("output_index", otherwise)
    if not isinstance(index, int):
        raise BrokenStream("an output item has no place")
    return index


def _final(response: Any, items: dict[int, dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(response, dict):
        raise BrokenStream("the last event carries no response")
    if items and not response.get("output"):
        # Some backends send the items only in their own events.
        return {**response, "output": [items[index] for index in sorted(items)]}
    return response


def _refusal(answer: Any) -> NotStored | None:
    if not isinstance(answer, dict):
        return NotStored.MALFORMED
    if answer.get("error") or answer.get("status") in ("failed", "cancelled"):
        return NotStored.ERROR_STATUS
    if answer.get("status") == "incomplete":
        details = answer.get("incomplete_details")
        filtered = isinstance(details, dict) and details.get("reason") == "content_filter"
        return NotStored.FILTERED if filtered else NotStored.TRUNCATED
    output = answer.get("output")
    if answer.get("status") != "completed" or not isinstance(output, list):
        return NotStored.MALFORMED
    if not all(isinstance(item, dict) for item in output):
        return NotStored.MALFORMED
    if any(item.get("status") == "incomplete" for item in output):
        return NotStored.TRUNCATED
    if not any(_says_something(item) for item in output):
        return NotStored.EMPTY
    return unwritable(answer)


def _says_something(item: dict[str, Any]) -> bool:
    """Whether an output item is part of an answer: a call always is, a message if it has words, a thought never."""
    if item.get("type") == "reasoning":
        return False
    if item.get("type") != "message":
        return True
    parts = item.get("content")
    return isinstance(parts, list) and any(
        isinstance(part, dict) and (part.get("text") or part.get("refusal")) for part in parts
    )


def _events(response: dict[str, Any], begun: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(response["output"]):
        yield from _item_events(item, index)
    yield {"type": "response.completed", "response": response}


def _item_events(item: dict[str, Any], index: int) -> Iterator[dict[str, Any]]:
    field, name = _ITEM_TEXTS.get(item["type"], ("", ""))
    place = {"item_id": item.get("id", ""), "output_index": index}
    yield {"type": "response.output_item.added", "output_index": index, "item": _opened(item, field)}
    for number, part in enumerate(item.get("summary") or ()):
        yield from _summary_events(part, {**place, "summary_index": number})
    # Search results and their like also have a content: only messages and thoughts are told in parts.
    if item["type"] in ("message", "reasoning"):
        for number, part in enumerate(item.get("content") or ()):
            yield from _part_events(part, {**place, "content_index": number})
    if field and isinstance(item.get(field), str):
        yield from _text_events(item[field], field, name, place, {})
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _opened(item: dict[str, Any], field: str) -> dict[str, Any]:
    """Give an item as it was before anything of it was said."""
    blank: dict[str, Any] = {name: [] for name in ("content", "summary") if isinstance(item.get(name), list)}
    if field in item:
        blank[field] = ""
    if "status" in item:
        blank["status"] = "in_progress"
    return {**item, **blank}


def _part_events(part: dict[str, Any], place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    field, name = _PART_TEXTS.get(part["type"], ("", ""))
    blank: dict[str, Any] = {key: [] for key in ("annotations", "logprobs") if isinstance(part.get(key), list)}
    if field:
        blank[field] = ""
    yield {"type": "response.content_part.added", **place, "part": {**part, **blank}}
    if field:
        extra = {"logprobs": part.get("logprobs") or []} if name == "output_text" else {}
        yield from _text_events(part[field], field, name, place, extra)
    for number, annotation in enumerate(part.get("annotations") or ()):
        yield {
            "type": "response.output_text.annotation.added",
            **place,
            "annotation_index": number,
            "annotation": annotation,
        }
    yield {"type": "response.content_part.done", **place, "part": part}


def _summary_events(part: dict[str, Any], place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "response.reasoning_summary_part.added", **place, "part": {**part, "text": ""}}
    yield from _text_events(part["text"], "text", "reasoning_summary_text", place, {})
    yield {"type": "response.reasoning_summary_part.done", **place, "part": part}


def _text_events(
    text: str, field: str, name: str, place: dict[str, Any], extra: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Tell a text in pieces, then whole; log probabilities are told with the whole."""
    blank: dict[str, Any] = {key: [] for key in extra}
    for piece in pieces(text):
        yield {"type": f"response.{name}.delta", **place, "delta": piece, **blank}
    yield {"type": f"response.{name}.done", **place, field: text, **extra}
