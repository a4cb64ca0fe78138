"""Adding the chunks of a stream up to the answer that a non-streaming call would have got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from gateway.wire import BrokenStream
from gateway.wire.sse import DONE

TEXT_FIELDS = frozenset(
    {
        "arguments",
        "content",
        "data",
        "input",
        "reasoning",
        "reasoning_content",
        "refusal",
        "text",
        "thinking",
        "transcript",
    }
)
"""Strings that arrive in pieces, wherever they stand in a chunk."""

# Said once, and repeated in full by some backends.
_ONCE = frozenset({"format", "id", "name", "object", "role", "type"})
# Said again when it changes: the last word counts.
_LAST = frozenset({"finish_reason", "matched_stop", "native_finish_reason", "severity", "status", "stop_reason"})
_FIRST_CHUNK = frozenset({"created", "id", "model"})


class Accumulator:
    """Adds deltas to a dict: text in pieces is joined, lists grow or merge by `index`, the rest is set.

    Unknown fields are kept: an unknown string that differs from chunk to chunk is taken for text.
    """

    def __init__(self) -> None:
        self._texts: list[tuple[dict[str, Any], str, _Pieces]] = []

    def add(self, into: dict[str, Any], delta: dict[str, Any]) -> None:
        """Add one delta, which must be the caller's to give away.

        Raises BrokenStream when a field changes its type.
        """
        for name, new in delta.items():
            old = into.get(name)
            # The three that every token brings come first and by exact type: this loop is most of a miss's own time.
            if type(old) is _Pieces and type(new) is str:
                old.append(new)
            elif type(old) is dict and type(new) is dict:
                self.add(old, new)
            elif type(old) is int and type(new) is int:
                into[name] = new
            elif new is None:
                into.setdefault(name, None)
            elif old is None or old == "":
                into[name] = self._join_lists([], new) if isinstance(new, list) else new
            else:
                self._join(into, name, old, new)

    def settle(self) -> None:
        """Put the joined texts in their places; nothing may be added afterwards."""
        for holder, name, pieces in self._texts:
            holder[name] = "".join(pieces)
        self._texts.clear()

    def _join(self, into: dict[str, Any], name: str, old: Any, new: Any) -> None:
        match old, new:
            case str(), str():
                self._join_strings(into, name, old, new)
            case _Pieces(), _:
                raise BrokenStream(f"{name} changes its type")
            case list(), list():
                self._join_lists(old, new)
            case int() | float(), int() | float():
                into[name] = new
            case _:
                raise BrokenStream(f"{name} changes its type")

    def _join_strings(self, into: dict[str, Any], name: str, old: str, new: str) -> None:
        if name in _ONCE:
            return
        if name in _LAST:
            into[name] = new
        elif name in TEXT_FIELDS or old != new:
            # A list of pieces: adding strings would copy the whole text once per token.
            into[name] = pieces = _Pieces((old, new))
            self._texts.append((into, name, pieces))

    def _join_lists(self, old: list[Any], new: list[Any]) -> list[Any]:
        for item in new:
            same = _same_item(old, item) if isinstance(item, dict) else None
            if same is None:
                old.append(item)
            else:
                self.add(same, item)
        return old


class _Pieces(list[str]):
    """A text whose pieces are not joined yet."""


def _same_item(items: list[Any], item: dict[str, Any]) -> dict[str, Any] | None:
    """Find the item of a list that a fragment continues: by `index`, never by position."""
    index = item.get("index")
    if index is None:
        return None
    return next((known for known in reversed(items) if isinstance(known, dict) and known.get("index") == index), None)


def payloads(events: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Parse the payloads of a stream up to `[DONE]`, keep-alives left out.

    Raises BrokenStream for what is not a JSON object, and for an error told in the stream.
    """
    for data in events:
        if not data:
            continue
        if data.startswith(DONE):
            return
        yield parse_payload(data)


def parse_payload(data: bytes) -> dict[str, Any]:
    """Parse one payload; raises BrokenStream for garbage and for errors."""
    try:
        payload = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BrokenStream(f"an event is not JSON: {error}") from error
    if not isinstance(payload, dict):
        raise BrokenStream("an event is not a JSON object")
    if payload.get("error"):
        raise BrokenStream(f"the stream tells an error: {str(payload['error'])[:200]}")
    return payload


def merge_chunks(events: Iterable[bytes], kind: str) -> dict[str, Any]:
    """Add up the chunks of chat or completions; choices still hold their `delta`.

    `kind` is the `object` of the answer. Raises BrokenStream unless every choice came to its finish: `[DONE]` alone
    proves nothing, and some backends close after the finish without sending it.
    """
    accumulator = Accumulator()
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    try:
        for chunk in payloads(events):
            for choice in _take_choices(chunk):
                accumulator.add(choices.setdefault(choice.get("index", 0), {}), choice)
            _add_envelope(answer, chunk)
    except RecursionError as error:
        raise BrokenStream("a chunk is nested too deeply") from error
    accumulator.settle()
    if not choices:
        raise BrokenStream("no chunk has a choice")
    if any(not choice.get("finish_reason") for choice in choices.values()):
        raise BrokenStream("a choice has no finish_reason")
    answer["object"] = kind
    answer["choices"] = [{**choices[index], "index": index} for index in sorted(choices)]
    return answer


def _take_choices(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    choices = chunk.pop("choices", None)
    if choices is None and isinstance(chunk.get("usage"), dict):
        return []
    if not isinstance(choices, list):
        raise BrokenStream("a chunk has no choices")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
            raise BrokenStream("a choice is not one")
        # Some backends repeat the whole message so far beside the delta.
        choice.pop("message", None)
    return choices


def _add_envelope(answer: dict[str, Any], chunk: dict[str, Any]) -> None:
    """Take a chunk's own fields: the identity from the first chunk that has it, the rest from the last."""
    for name, value in chunk.items():
        old = answer.get(name)
        if value is None:
            if name != "usage":
                answer.setdefault(name, None)
        elif not old:
            answer[name] = value
        elif name not in _FIRST_CHUNK:
            merges = isinstance(old, dict) and isinstance(value, dict) and name != "usage"
            answer[name] = {**old, **value} if merges else value
    # Padding against traffic analysis: it has no meaning outside its chunk.
    answer.pop("obfuscation", None)
