"""Telling an error after the status line has gone out."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.wire.sse import encode


def error_event(endpoint: str, error: dict[str, Any], *, sequence_number: int = 0) -> bytes:
    """Write the event that tells an error in mid-stream.

    `error` has `message`, `type`, `param` and `code`, as in the body of an error's answer. Clients look for the
    `error` object whatever the endpoint; those of responses also expect a typed, numbered event.
    """
    payload: dict[str, Any] = {"error": error}
    if endpoint == "responses":
        named = {name: error.get(name) for name in ("code", "message", "param")}
        payload = {"type": "error", **named, "sequence_number": sequence_number, **payload}
    return encode(orjson.dumps(payload), "error")
