"""Refreshes in the background: a stale answer was served, and a new one is fetched for those who come next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.errors import ApiError

log = logging.getLogger(__name__)

MOST = 64
"""Refreshes under way at once; a stale answer beyond that is served without one."""


class Refreshes:
    """At most one refresh of a key, and at most `most` in all."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._tasks: dict[bytes, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def begin(self, key: bytes, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Start the work unless this key is being refreshed or too many are; says whether it was started."""
        if key in self._tasks or len(self._tasks) >= self._most:
            return False
        task = asyncio.ensure_future(_run(work))
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key))
        return True

    async def close(self) -> None:
        """Cancel what is under way and wait for it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await work()
    except ApiError as error:
        # The stale answer was served; the next caller tries again.
        log.info("a stale answer was not refreshed: %s", error)
    except Exception:
        log.exception("a stale answer was not refreshed")
