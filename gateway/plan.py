"""What travels through the rooms: the plan of a call, and what a flight resolves to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cachestore import Hit
from gateway.call import Call
from gateway.semantic import Looked
from gateway.timing import Timing
from gateway.upstream import Backend, Headers
from gateway.wire import Wire
from gateway.wire.endpoints import WIRES
from policies.canonical import Origin
from policies.category import CategoryPolicy
from policies.reasons import Bypass, NotStored


@dataclass(frozen=True, slots=True)
class Shared:
    """Where a tenant that shares finds the answers of others."""

    origin: Origin
    key: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a call before any room is entered."""

    call: Call
    pool: tuple[Backend, ...]
    decided: CategoryPolicy | None
    bypass: Bypass | None
    origin: Origin
    key: bytes
    fields: dict[str, Any]
    timing: Timing = field(default_factory=Timing)
    shared: Shared | None = None
    """The same call in the namespace that tenants share; None where they do not."""

    @property
    def wire(self) -> Wire:
        """The shapes of the call's endpoint."""
        return WIRES[self.call.endpoint]


@dataclass(frozen=True, slots=True)
class Found:
    """A flight's head: the cache has an answer of the same meaning."""

    looked: Looked
    hit: Hit
    detail: str = "semantic"


@dataclass(frozen=True, slots=True)
class Generated:
    """A flight's head: a backend's whole answer, an error of its own among them."""

    looked: Looked
    backend: str
    status: int
    headers: Headers
    body: bytes
    kept: int | NotStored


@dataclass(slots=True)
class Streaming:
    """A flight's head: events follow."""

    looked: Looked
    backend: str
    headers: Headers
    kept: NotStored | None
    """Until the flight has landed: None promises to store the answer if it ends whole."""
    usage: bytes = b""
    """The usage chunk, which only those see who asked for it."""
    body: bytes = b""
    """The answer added up, once the flight has landed."""


FlightHead = Found | Generated | Streaming
