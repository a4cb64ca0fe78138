"""`POST /v1/hitpath/feedback`: a client says what an answer was worth."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.call import read_controls
from gateway.corrections import Corrections, inside
from gateway.errors import BadRequestError, MethodError, UnknownEntryError
from gateway.http import Inbox, Request
from gateway.responder import JSON, Responder
from gateway.tenants import Caller, Tenants, credential

_MAX_BODY = 2**16
_VERDICTS = ("right", "wrong")
_LARGEST_ID = 2**62


class FeedbackDoor:
    """`POST /v1/hitpath/feedback`."""

    def __init__(self, corrections: Corrections, tenants: Tenants) -> None:
        self._corrections = corrections
        self._tenants = tenants

    async def __call__(self, request: Request, respond: Responder) -> None:
        """Take a verdict. Raises MethodError, BadRequestError, UnknownEntryError and what identifying raises."""
        if request.method != "POST":
            raise MethodError(f"{request.method} is not allowed here; use POST")
        caller = self._tenants.identify(credential(request.headers))
        inner = read_controls(request.headers).namespace
        entry, verdict = _parsed(await Inbox(request.receive).read(request.headers, _MAX_BODY))
        own, shared = _namespaces(caller, inner)
        owner = await self._corrections.owner(entry)
        if owner is None or not any(inside(owner, name) for name in (own, shared) if name):
            # Another tenant's entry and none at all look alike.
            raise UnknownEntryError(f"there is no entry {entry}", param="entry")
        removed, hits = False, 0
        if verdict == "wrong":
            removed, hits = await self._corrections.wrong(entry, own, owner)
        # Praise proves nothing, since who praises chooses himself: it is heard, and changes nothing.
        document = {"entry": entry, "verdict": verdict, "removed": removed, "hits": hits}
        await respond.whole(200, [JSON], orjson.dumps(document))


def _namespaces(caller: Caller, inner: str) -> tuple[str, str]:
    """The caller's own namespace, and the one that it shares; empty where it shares none."""
    own = f"{caller.namespace}/{inner}" if inner else caller.namespace
    return own, (f"{caller.shared}/{inner}" if inner else caller.shared) if caller.shared else ""


def _parsed(raw: bytes) -> tuple[int, str]:
    try:
        document: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRequestError("the body must be a JSON object with entry and verdict")
    if unknown := sorted(set(document) - {"entry", "verdict"}):
        raise BadRequestError(f"{unknown[0]!r} is unknown; valid are entry, verdict", param=unknown[0])
    entry, verdict = document.get("entry"), document.get("verdict")
    if isinstance(entry, str) and entry.isascii() and entry.isdigit() and len(entry) < 19:
        entry = int(entry)  # as it stands in x-hitpath-entry
    if not isinstance(entry, int) or isinstance(entry, bool) or not 0 < entry <= _LARGEST_ID:
        raise BadRequestError("entry must be the number that x-hitpath-entry named", param="entry")
    if verdict not in _VERDICTS:
        raise BadRequestError(f"verdict must be one of {', '.join(_VERDICTS)}", param="verdict")
    return entry, verdict
