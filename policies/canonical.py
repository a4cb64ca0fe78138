"""The exact key: equal for two requests only if any backend must treat them alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

_VERSION = 1
"""Raised whenever the form below changes, so that old entries are absent rather than wrong."""

_DELIVERY = frozenset({"stream", "stream_options"})
"""How an answer is delivered, not what it says."""

_BOOKKEEPING = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Who asks and how it is billed. `/v1/responses` echoes these in its answer, so there they are part of the key."""

_IGNORED = {
    "chat": _DELIVERY | _BOOKKEEPING,
    "completions": _DELIVERY | _BOOKKEEPING,
    "embeddings": frozenset({"user"}),
    "responses": _DELIVERY,
}

_EXACT_FLOAT = 2.0**53
"""From here on a float no longer names one integer, and two different literals may parse to it."""


class CanonicalError(ValueError):
    """The body cannot be told apart from another one, so it must not be cached."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What shapes an answer besides the body."""

    endpoint: str
    namespace: str
    backend: str
    """The pool of upstreams that may answer."""
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    """Request headers that change what a backend does, such as `openai-beta`."""


def shaping_fields(endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the body that shapes the answer, numbers in one form, nulls gone (null means absent).

    Raises CanonicalError when a number is too large to be told apart from its neighbours.
    """
    ignored = _IGNORED[endpoint]
    return {name: _plain(value) for name, value in body.items() if value is not None and name not in ignored}


def digest(origin: Origin, fields: object) -> bytes:
    """Return the 16-byte BLAKE2b digest of origin and fields. Raises CanonicalError when nested too deeply."""
    parts = [_VERSION, origin.endpoint, origin.namespace, origin.backend, origin.query, origin.headers, fields]
    try:
        canonical = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise CanonicalError("the body is nested too deeply") from error
    return blake2b(canonical, digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return _plain_float(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _plain_float(value: float) -> float | int:
    if abs(value) >= _EXACT_FLOAT:
        raise CanonicalError(f"the number {value!r} is too large to be read exactly")
    return int(value) if value.is_integer() else value
