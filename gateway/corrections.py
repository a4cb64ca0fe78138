"""Corrections: a client says that a hit was wrong, in words or by asking anew at once.

The entry goes, the pair of questions is remembered, and the budget hears of it. What tenants share is not one tenant's
to remove: there the pair alone is remembered, for that tenant.
"""

from __future__ import annotations

import time

from cachestore import Filter, Store
from gateway.trust import Trust
from gateway.trustmetrics import TrustMetrics
from gateway.truststate import TrustFile
from policies.reasons import Complaint


class Corrections:
    """Acts on complaints."""

    def __init__(self, store: Store, trust: Trust, file: TrustFile, metrics: TrustMetrics) -> None:
        self._store = store
        self._trust = trust
        self._file = file
        self._metrics = metrics

    async def refreshed(self, key: bytes, namespace: str) -> None:
        """A call is asked anew; if it got a hit by meaning just before, that is a complaint."""
        entry = self._trust.refreshed(key, time.monotonic())
        if entry is None:
            return
        self._metrics.complaint(Complaint.REFRESH)
        await self._remove(entry, namespace)

    async def wrong(self, entry: int, namespace: str, owner: str) -> tuple[bool, int]:
        """A client of `namespace` says that the answer of an entry in the namespace `owner` was wrong.

        Returns whether the entry was removed, and how many hits the complaint was about. Durable when it returns.
        """
        hits = self._trust.corrected(entry, namespace)
        self._metrics.complaint(Complaint.FEEDBACK)
        return await self._remove(entry, namespace, owner), hits

    async def owner(self, entry: int) -> str | None:
        """Return the namespace of an entry; None where there is none."""
        rows = await self._store.entries(Filter(ids=(entry,)), limit=1)
        return rows[0].namespace if rows else None

    async def _remove(self, entry: int, namespace: str, owner: str | None = None) -> bool:
        owner = await self.owner(entry) if owner is None else owner
        removed = owner is not None and inside(owner, namespace)
        if removed:
            await self._store.purge(Filter(ids=(entry,)))
        await self._file.flush()
        return removed


def inside(namespace: str, outer: str) -> bool:
    """Whether a namespace is `outer` or lies inside it."""
    return namespace == outer or namespace.startswith(f"{outer}/")
