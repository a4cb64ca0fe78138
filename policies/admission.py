"""Admission: which finished answers are worth keeping, allowed to be kept, and for how long."""

from __future__ import annotations

from policies.category import CategoryPolicy
from policies.controls import Controls, Mode
from policies.freshness import Horizon, jittered, worth_keeping
from policies.reasons import NotStored


def admit(
    refusal: NotStored | None,
    policy: CategoryPolicy,
    controls: Controls,
    *,
    horizon: Horizon = Horizon.NONE,
    missed: int = 1,
) -> NotStored | None:
    """Say why an answer is not stored; None admits it. `refusal` is what its own shape already forbids.

    `horizon` is how soon the question says that its answer changes, `missed` how often it was missed so far.
    """
    if controls.no_store or policy.mode is Mode.OFF:
        return NotStored.FORBIDDEN
    if policy.ttl <= 0:
        return NotStored.EXPIRED_AT_ONCE
    if policy.freshness.ttl(policy.ttl, horizon) <= 0:
        return NotStored.VOLATILE
    if refusal is None and not worth_keeping(missed, policy.admit_after):
        return NotStored.TOO_SELDOM
    return refusal


def lifetime(policy: CategoryPolicy, controls: Controls, horizon: Horizon, draw: float) -> float:
    """Return the seconds that an admitted answer lives; `draw` is uniform in [0, 1).

    A TTL that the client names is not jittered.
    """
    ttl = policy.freshness.ttl(policy.ttl, horizon)
    return ttl if controls.ttl is not None else jittered(ttl, policy.ttl_jitter, draw)
