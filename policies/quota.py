"""Shares of a budget: what a category is guaranteed, what it may borrow, and who gives way when the budget is full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quota:
    """A category's shares of the budget, each between 0 and 1."""

    min_share: float = 0.0
    """Guaranteed: other categories never push it below this."""
    max_share: float = 1.0
    """A cap, which may be exceeded while the budget is free; what exceeds it is evicted first."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_share <= self.max_share <= 1.0:
            raise ValueError(f"a quota needs 0 <= min <= max <= 1, not min={self.min_share}, max={self.max_share}")


def check_quotas(quotas: Mapping[str, Quota]) -> None:
    """Raise ValueError when the guaranteed shares add up to more than the whole."""
    total = sum(quota.min_share for quota in quotas.values())
    if total > 1.0 + 1e-9:
        raise ValueError(f"the guaranteed shares of {', '.join(sorted(quotas))} add up to {total:.0%} of the budget")


def allowances(
    usage: Mapping[str, int], quotas: Mapping[str, Quota], budget: int, incoming: str | None = None
) -> tuple[dict[str, int], ...]:
    """How many bytes may be taken from each category, in rounds: an earlier round is used up before the next begins.

    First what categories hold above their cap, then what they hold above their guarantee, last (only to make room
    for `incoming`) what that category itself holds within its own guarantee.
    """
    over_cap: dict[str, int] = {}
    borrowed: dict[str, int] = {}
    for category, used in usage.items():
        quota = quotas.get(category, Quota())
        cap, floor = int(quota.max_share * budget), int(quota.min_share * budget)
        excess, above = max(0, used - cap), max(0, used - floor)
        if excess:
            over_cap[category] = excess
        if above - excess > 0:
            borrowed[category] = above - excess
    own = min(usage.get(incoming, 0), int(quotas.get(incoming, Quota()).min_share * budget)) if incoming else 0
    return over_cap, borrowed, ({incoming: own} if incoming and own else {})
