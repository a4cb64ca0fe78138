"""Admission: which finished answers are worth keeping, and allowed to be kept."""

from __future__ import annotations

from policies.category import CategoryPolicy
from policies.controls import Controls, Mode
from policies.reasons import NotStored


def admit(refusal: NotStored | None, policy: CategoryPolicy, controls: Controls) -> NotStored | None:
    """Say why an answer is not stored; None admits it. `refusal` is what its own shape already forbids."""
    if controls.no_store or policy.mode is Mode.OFF:
        return NotStored.FORBIDDEN
    if policy.ttl <= 0:
        return NotStored.EXPIRED_AT_ONCE
    return refusal
