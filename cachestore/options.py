"""What a store is told when it is opened, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from policies.quota import Quota, check_quotas


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Budgets and limits. Raises ValueError where they contradict each other."""

    memory_budget: int
    """Bytes for vectors, index, tables, hot bodies and what is charged."""
    disk_budget: int
    """Bytes of the log."""
    max_body: int
    """Bytes; larger answers are refused."""
    embedder: str
    """Identity of the embedder whose vectors come in."""
    stale_grace: float = 3600.0
    """Seconds that an expired entry is kept for callers that accept stale answers."""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """By category."""
    max_waiting: int = 1024
    """Documents that may wait for the writer; more are refused."""
    retry_after: float = 30.0
    """Seconds until storing is tried again after the disk was full."""
    max_file: int | None = None
    """Bytes at which the log's file refuses to grow, as a full disk would."""

    @property
    def wal_bytes(self) -> int:
        """At which size the write-ahead log is folded into the file: a small part of the disk budget."""
        return min(4 << 20, self.disk_budget // 32)

    @property
    def group_bytes(self) -> int:
        """Bytes of answers in one transaction, about; it makes the write-ahead log longer by as much."""
        return min(32 << 20, self.disk_budget // 32)

    @property
    def pages_budget(self) -> int:
        """Bytes for the log's own file; the rest of the disk budget is for the write-ahead log."""
        return self.disk_budget - 4 * self.wal_bytes

    def __post_init__(self) -> None:
        for name in ("memory_budget", "disk_budget", "max_body", "max_waiting"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.stale_grace < 0 or self.retry_after < 0:
            raise ValueError("stale_grace and retry_after cannot be negative")
        check_quotas(self.quotas)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store says of itself."""

    entries: int
    scopes: int
    loaded: bool
    """Whether memory knows every entry of the log."""
    memory_used: int
    memory_budget: int
    memory_by_kind: Mapping[str, int]
    """`entries` (vectors, index, tables), `hot` and every kind that was charged; bytes."""
    memory_by_category: Mapping[str, int]
    disk_used: int
    disk_budget: int
    disk_by_category: Mapping[str, int]
    hot_bodies: int
    hits: int
    stored: int
    evicted: int
    expired: int
    damaged: int
    """Rows that were skipped and deleted because their checksum was wrong."""
    waiting: int
    """Documents that wait for the writer."""
    storing_off: str | None
    """Why nothing is stored for now."""
    moved_aside: tuple[str, ...]
    """Damaged log files, where they lie now."""
