"""Sizes, durations, shares and rates as people write them."""

from __future__ import annotations

import re

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(.*)", re.ASCII)


class UnitError(ValueError):
    """A value that is not of the unit asked for; the message says what would be."""


def size(value: object) -> int:
    """Return bytes from 4096, "64KiB", "2GiB", "500MB". Raises UnitError."""
    amount, unit = _amount(value, "a size such as 512MiB, 2GiB or a number of bytes")
    if unit not in _SIZES:
        raise UnitError(f"{value!r} has the unknown unit {unit!r}; sizes end in one of {_names(_SIZES)}")
    return int(amount * _SIZES[unit])


def duration(value: object) -> float:
    """Return seconds from 30, "500ms", "90s", "5m", "1h", "7d". Raises UnitError."""
    amount, unit = _amount(value, "a duration such as 30s, 5m, 1h, 7d or a number of seconds")
    if unit not in _SECONDS:
        raise UnitError(f"{value!r} has the unknown unit {unit!r}; durations end in one of {_names(_SECONDS)}")
    return amount * _SECONDS[unit]


def share(value: object) -> float:
    """Return a fraction 0 … 1 from "10%" or 0.1. Raises UnitError."""
    amount, unit = _amount(value, "a share such as 10% or 0.1")
    if unit not in ("", "%"):
        raise UnitError(f"{value!r} has the unknown unit {unit!r}; a share is written 10% or 0.1")
    fraction = amount / 100 if unit else amount
    if fraction > 1:
        raise UnitError(f"{value!r} is more than the whole; a share lies between 0 and 100%")
    return fraction


def rate(value: object) -> float:
    """Return events per second from "50/s", "600/m", "1000/h". Raises UnitError."""
    amount, unit = _amount(value, "a rate such as 50/s or 600/m")
    per = _SECONDS.get(unit.removeprefix("/"))
    if not unit.startswith("/") or unit == "/" or per is None or amount <= 0:
        raise UnitError(f"{value!r} is not a rate; write it as 50/s, 600/m or 1000/h, above zero")
    return amount / per


def _amount(value: object, expected: str) -> tuple[float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value), ""
    found = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise UnitError(f"{value!r} is not {expected}")
    return float(found[1]), found[2]


def _names(units: dict[str, int] | dict[str, float]) -> str:
    return ", ".join(unit for unit in units if unit)
