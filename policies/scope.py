"""The scope: where similarity is allowed to speak.

Everything that shapes an answer except the last user text and the exact sampling figures goes into one fingerprint;
only entries with the same fingerprint are ever compared by meaning. So a follow-up in another conversation, another
tenant or another tool set cannot match, by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policies.canonical import Origin, digest

_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "seed"})
_FOCUSED = 0.5
_CREATIVE = 1.1


@dataclass(frozen=True, slots=True)
class Comparable:
    """A call that may be compared by meaning."""

    text: str
    """The last user text."""
    rest: dict[str, Any]
    """Every other shaping field, with the text taken out."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The shaping fields, without the text."""
        fields: Mapping[str, Any] = self.rest["fields"]
        return fields

    def scope(self, origin: Origin, embedder: str) -> bytes:
        """Return the 16-byte fingerprint of all that must be equal; `embedder` is the embedder's identity."""
        return digest(origin, [embedder, self.rest])


def comparable(endpoint: str, fields: Mapping[str, Any]) -> Comparable | None:
    """Split shaping fields into the text to compare and the rest; None when the call has no last user text.

    Raw completions and embeddings are never compared: a small change of a prefix is another continuation.
    """
    match endpoint:
        case "chat":
            return _last_turn(fields, "messages", ("text",))
        case "responses":
            return _response_input(fields)
        case _:
            return None


def sampling_class(fields: Mapping[str, Any]) -> str:
    """Name the kind of sampling: answers of one class may stand for each other, exact figures need not agree."""
    temperature = fields.get("temperature")
    if temperature == 0 or fields.get("top_k") == 1:
        return "greedy"
    if not isinstance(temperature, int | float):
        return "balanced"
    if temperature <= _FOCUSED:
        return "focused"
    return "balanced" if temperature <= _CREATIVE else "creative"


def _response_input(fields: Mapping[str, Any]) -> Comparable | None:
    if isinstance(fields.get("input"), str):
        return _split(fields, fields["input"], "input", None)
    return _last_turn(fields, "input", ("input_text", "text"))


def _last_turn(fields: Mapping[str, Any], name: str, text_types: tuple[str, ...]) -> Comparable | None:
    turns = fields.get(name)
    if not isinstance(turns, list) or not turns:
        return None
    last = turns[-1]
    if not isinstance(last, dict) or last.get("role") != "user":
        return None
    taken = _take_text(last.get("content"), text_types)
    if taken is None:
        return None
    text, content = taken
    return _split(fields, text, name, [*turns[:-1], {**last, "content": content}])


def _split(fields: Mapping[str, Any], text: str, name: str, remainder: object) -> Comparable | None:
    if not text.strip():
        return None
    rest = {key: value for key, value in fields.items() if key not in _SAMPLING}
    rest[name] = remainder
    return Comparable(text, {"fields": rest, "sampling": sampling_class(fields)})


def _take_text(content: object, text_types: tuple[str, ...]) -> tuple[str, object] | None:
    """Return the text and what is left of the content, images and files kept as part of the scope."""
    if isinstance(content, str):
        return content, None
    if not isinstance(content, list):
        return None
    texts: list[str] = []
    remainder: list[object] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in text_types and isinstance(part.get("text"), str):
            texts.append(part["text"])
            remainder.append({key: value for key, value in part.items() if key != "text"})
        else:
            remainder.append(part)
    return ("\n".join(texts), remainder) if texts else None
