"""A token bucket per tenant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """Admits `rate` calls per second on average and one second's worth at once (at least one)."""

    rate: float
    tokens: float = 0.0
    updated: float = float("-inf")

    def take(self, now: float) -> float:
        """Take one call at the time `now` (seconds); return 0.0, or the seconds until one would be admitted."""
        burst = max(1.0, self.rate)
        elapsed = now - self.updated
        self.tokens = burst if elapsed == float("inf") else min(burst, self.tokens + elapsed * self.rate)
        self.updated = now
        if self.tokens >= 1.0:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.rate
