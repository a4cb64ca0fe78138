"""What a client asks of the cache: `Cache-Control` (RFC 9111 §5.2.1) and the `x-hitpath-*` request headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from policies.units import UnitError, duration


class Mode(StrEnum):
    """How far the cache may go for a call, strictest first."""

    OFF = "off"
    EXACT = "exact"
    SEMANTIC = "semantic"

    def stricter(self, other: Mode) -> Mode:
        """Return the one of the two that allows less."""
        order = list(Mode)
        return min(self, other, key=order.index)


class ControlError(ValueError):
    """A request control that cannot be read."""

    def __init__(self, header: str, message: str) -> None:
        super().__init__(f"{header}: {message}")
        self.header = header


@dataclass(frozen=True, slots=True)
class Controls:
    """The controls of one call; the defaults are those of a call that says nothing."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age: float | None = None
    stale_if_error: float = 0.0
    mode: Mode | None = None
    category: str | None = None
    ttl: float | None = None
    threshold: float | None = None
    namespace: str = ""
    explain: bool = False
    """Say what would be done, and do nothing."""

    def variant(self) -> tuple[object, ...]:
        """Return what must agree before two calls with one exact key may share one generation."""
        return (self.no_cache, self.only_if_cached, self.max_age, self.mode, self.category, self.ttl, self.threshold)


EXPLAIN = "explain"
"""The mode in which a call is explained instead of answered."""
PLAIN = Controls()
_MAX_NAMESPACE = 256


def parse_controls(headers: Mapping[str, str]) -> Controls:
    """Read the controls from lower-cased request headers; raises ControlError naming the header and a right value."""
    directives = _directives(headers.get("cache-control", ""))
    explain = headers.get("x-hitpath-mode", "").strip().lower() == EXPLAIN
    return Controls(
        no_cache="no-cache" in directives,
        no_store="no-store" in directives,
        only_if_cached="only-if-cached" in directives,
        max_age=_seconds(directives, "max-age"),
        stale_if_error=_seconds(directives, "stale-if-error") or 0.0,
        mode=None if explain else _mode(headers.get("x-hitpath-mode")),
        category=headers.get("x-hitpath-category"),
        ttl=_ttl(headers.get("x-hitpath-ttl")),
        threshold=_threshold(headers.get("x-hitpath-threshold")),
        namespace=_namespace(headers.get("x-hitpath-namespace", "")),
        explain=explain,
    )


def _directives(value: str) -> dict[str, str]:
    directives: dict[str, str] = {}
    for part in value.split(","):
        name, _, argument = part.partition("=")
        directives[name.strip().lower()] = argument.strip().strip('"')
    return directives


def _seconds(directives: Mapping[str, str], name: str) -> float | None:
    if name not in directives:
        return None
    argument = directives[name]
    if not (argument.isascii() and argument.isdigit()):
        raise ControlError("cache-control", f"{name}={argument!r} is not a whole number of seconds")
    return float(argument)


def _mode(value: str | None) -> Mode | None:
    if value is None:
        return None
    try:
        return Mode(value.strip().lower())
    except ValueError:
        raise ControlError("x-hitpath-mode", f"{value!r} is not one of {', '.join(Mode)}, {EXPLAIN}") from None


def _ttl(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return duration(float(value) if value.isascii() and value.isdigit() else value)
    except UnitError as error:
        raise ControlError("x-hitpath-ttl", str(error)) from None


def _threshold(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        threshold = float(value)
    except ValueError:
        threshold = -1.0
    if not 0.0 <= threshold <= 1.0:
        raise ControlError("x-hitpath-threshold", f"{value!r} is not a similarity between 0 and 1")
    return threshold


def _namespace(value: str) -> str:
    if len(value) > _MAX_NAMESPACE or not value.isprintable():
        raise ControlError("x-hitpath-namespace", f"must be at most {_MAX_NAMESPACE} printable characters")
    return value
