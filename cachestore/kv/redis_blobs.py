"""Blobs in a Redis that may be gone at any time: every call is answered, soon, and with False where it cannot be done.

Redis bounds itself: give it `maxmemory` and `maxmemory-policy allkeys-lru`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis

T = TypeVar("T")
_PREFIX = b"hitpath:kv:"


class RedisBlobs:
    """get, set and delete. After a failure nothing is tried for `pause` seconds."""

    def __init__(self, url: str, *, timeout: float = 1.0, pause: float = 1.0) -> None:
        """`url` as `redis://[user:password@]host:port/db`. Does not connect. Raises ValueError for another kind."""
        self._client: Any = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, health_check_interval=0
        )
        self._pause = pause
        self._again = 0.0
        self._lock = threading.Lock()
        self.failures = 0
        """Calls that Redis did not answer, or refused."""

    def get(self, name: bytes, target: memoryview) -> bool:
        """Fill `target`; False if there is no such blob or it has another size."""
        data = self._try(lambda: self._client.get(_PREFIX + name), None)
        if data is None or len(data) != len(target):
            return False
        target.cast("B")[:] = data
        return True

    def set(self, name: bytes, data: memoryview) -> bool:
        """Write a blob."""
        return self._try(lambda: bool(self._client.set(_PREFIX + name, bytes(data))), False)

    def delete(self, names: Sequence[bytes]) -> bool:
        """Remove these where they are."""
        return self._try(lambda: bool(self._client.delete(*(_PREFIX + name for name in names)) >= 0), False)

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()

    def _try(self, call: Callable[[], T], otherwise: T) -> T:
        with self._lock:
            if time.monotonic() < self._again:
                return otherwise
        try:
            return call()
        except redis.ResponseError:  # out of memory, say: the next one may be answered
            self.failures += 1
        except (redis.RedisError, OSError):
            self.failures += 1
            with self._lock:
                self._again = time.monotonic() + self._pause
        return otherwise
