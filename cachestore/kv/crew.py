"""Threads for work that may never end, such as reading from a disk that does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger("hitpath.kv")


class Crew:
    """A few threads that share the work. One that is stuck no longer counts, and another takes its place.

    None of them keeps the process from ending.
    """

    def __init__(self, count: int, name: str, *, slow: float, most: int) -> None:
        """`count` work at a time, beside those that are stuck: at the same piece for `slow` seconds. `most` in all."""
        self._count, self._name, self._slow, self._most = count, name, slow, most
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._began: dict[int, float] = {}
        """By thread: since when it is at what it is at."""
        self._threads = self._idle = 0
        self._closed = False

    def submit(self, work: Callable[[], None]) -> None:
        """To be done after what was submitted before. It must not raise. After `close` it is forgotten."""
        with self._changed:
            if self._closed:
                return
            self._waiting.append(work)
            self._staff()
            self._changed.notify()

    def relieve(self) -> None:
        """Put others in the place of those that are stuck. `submit` does so too; call it where something waits."""
        with self._changed:
            self._staff()

    def stuck(self) -> bool:
        """Whether all are that there may be, so that nothing can be expected of any."""
        with self._changed:
            return self._stuck() >= self._most

    def close(self) -> bool:
        """Begin nothing more, and wait for those that are not stuck; whether all have ended what they were at."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            while len(self._began) > self._stuck():
                self._changed.wait(self._slow / 10)
            return not self._began

    def _stuck(self) -> int:
        since = time.monotonic() - self._slow
        return sum(began < since for began in self._began.values())

    def _staff(self) -> None:
        able = self._threads - self._stuck()
        wanted = min(len(self._waiting) - self._idle, self._count - able, self._most - self._threads)
        for _ in range(wanted):
            self._threads += 1
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()

    def _serve(self) -> None:
        me = threading.get_ident()
        while (work := self._next(me)) is not None:
            try:
                work()
            except Exception:
                _log.exception("work beside the answers failed")
            with self._changed:
                del self._began[me]
                self._changed.notify_all()

    def _next(self, me: int) -> Callable[[], None] | None:
        """What this thread is to do, when there is something; None: it is not needed any more."""
        with self._changed:
            while not self._waiting:
                if self._closed or self._threads - self._stuck() > self._count:
                    self._threads -= 1
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            self._began[me] = time.monotonic()
            return self._waiting.popleft()
