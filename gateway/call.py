"""One request on a cached path: a typed view over the parsed JSON, the original bytes kept beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import orjson

from gateway.errors import BadRequestError
from gateway.tenants import Caller
from gateway.upstream import Headers
from policies.canonical import CanonicalError, Origin, digest, shaping_fields
from policies.category import CallFacts
from policies.controls import PLAIN, ControlError, Controls, parse_controls

_CONTROL_HEADERS = frozenset(
    {
        "cache-control",
        "x-hitpath-mode",
        "x-hitpath-category",
        "x-hitpath-ttl",
        "x-hitpath-threshold",
        "x-hitpath-namespace",
    }
)
_SHAPING_HEADERS = frozenset({"openai-organization", "openai-project", "openai-beta", "x-hitpath-kv"})
_STATEFUL = ("previous_response_id", "conversation", "background", "prompt")
"""Fields of `/v1/responses` whose meaning lies in the backend's memory."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that the cache may answer."""

    endpoint: str
    path: str
    """Percent-encoded, without the version: `/chat/completions`."""
    query: str
    headers: Headers
    raw: bytes
    body: dict[str, Any]
    controls: Controls
    caller: Caller
    request_id: str

    @property
    def namespace(self) -> str:
        """The tenant's namespace, and the client's own inside it."""
        inner = self.controls.namespace
        return f"{self.caller.namespace}/{inner}" if inner else self.caller.namespace

    @property
    def shared_namespace(self) -> str:
        """The namespace that the tenant shares with others, and the client's own inside it; empty: none."""
        shared, inner = self.caller.shared or "", self.controls.namespace
        return f"{shared}/{inner}" if shared and inner else shared

    @property
    def said(self) -> list[str]:
        """The texts of the user's turns, or the prompt."""
        return _said(self.body, _USER)

    @property
    def model(self) -> str:
        """The model asked for."""
        return cast(str, self.body["model"])

    @property
    def stream(self) -> bool:
        """Whether the client wants events."""
        return self.body.get("stream") is True and self.endpoint != "embeddings"

    @property
    def include_usage(self) -> bool:
        """Whether the client asked for the usage chunk of a stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def stateful(self) -> bool:
        """Whether the answer depends on what the backend remembers of earlier calls."""
        return self.endpoint == "responses" and any(self.body.get(name) for name in _STATEFUL)

    def facts(self) -> CallFacts:
        """Return what category rules look at."""
        return CallFacts(
            self.endpoint, self.model, self.namespace, _texts(self.body, _SYSTEM), _texts(self.body, _USER)
        )


def parse_body(raw: bytes) -> dict[str, Any]:
    """Parse a request body. Raises BadRequestError that says where it is wrong."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, not {type(body).__name__}")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError("model must be a non-empty string", param="model")
    return body


def read_controls(headers: dict[str, str]) -> Controls:
    """Read the cache controls of a request. Raises BadRequestError naming the header."""
    if _CONTROL_HEADERS.isdisjoint(headers):
        return PLAIN
    try:
        return parse_controls(headers)
    except ControlError as error:
        raise BadRequestError(str(error), param=error.header) from error


def origin(call: Call, backend: str, headers: dict[str, str]) -> Origin:
    """Return what shapes the answer besides the body."""
    shaping: tuple[tuple[str, str], ...] = ()
    if not _SHAPING_HEADERS.isdisjoint(headers):
        shaping = tuple((name, headers[name]) for name in sorted(_SHAPING_HEADERS.intersection(headers)))
    return Origin(call.endpoint, call.namespace, backend, call.query, shaping)


def exact_key(origin: Origin, body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Return the exact key and the shaping fields. Raises BadRequestError when the body cannot be told apart."""
    try:
        fields = shaping_fields(origin.endpoint, body)
        return digest(origin, fields), fields
    except (CanonicalError, RecursionError) as error:
        raise BadRequestError(str(error)) from error


_SYSTEM = ("system", "developer")
_USER = ("user",)


def _texts(body: dict[str, Any], roles: tuple[str, ...]) -> str:
    return "\n".join(_said(body, roles))


def _said(body: dict[str, Any], roles: tuple[str, ...]) -> list[str]:
    """Return the texts of the roles' turns, and of the fields that stand for them."""
    names = ("instructions",) if roles is _SYSTEM else ("prompt", "input")
    fields = [body[name] for name in names if isinstance(body.get(name), str)]
    turns = [text for turn in _turns(body) if turn.get("role") in roles for text in _content(turn.get("content"))]
    return fields + turns


def _turns(body: dict[str, Any]) -> list[dict[str, Any]]:
    turns = body.get("messages", body.get("input"))
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def _content(content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
