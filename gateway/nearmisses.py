"""The near-miss log: what came close and was not served, in lines that `hitpath eval pairs` reads once labelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

import orjson

from gateway.semantic import Looked

log = logging.getLogger(__name__)

NAME = "near-misses.jsonl"
_WAITING = 1000
_EVERY = 1.0
_LONGEST = 2000
"""Characters of a question that are kept."""
Keep = Literal["off", "figures", "text"]


class NearMisses:
    """Writes lines in a thread; at its size the file becomes `….1`, whose predecessor goes."""

    def __init__(self, directory: Path, keep: Keep, size: int) -> None:
        """`keep` says whether questions may be written; `size` is in bytes, for the file and its predecessor each."""
        self._path = directory / NAME
        self._keep = keep
        self._size = size
        self._lines: deque[bytes] = deque(maxlen=_WAITING)
        self._failing = False
        self._task = asyncio.create_task(self._write_all()) if keep != "off" else None

    def note(self, namespace: str, looked: Looked, wrong: float | None) -> None:
        """Note a look-up whose best candidate was refused; `wrong` is what comparing the answers found."""
        if self._keep != "off" and looked.ruling is not None:
            self._lines.append(orjson.dumps(line(namespace, looked, wrong, with_text=self._keep == "text")) + b"\n")

    async def close(self) -> None:
        """Write what waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits now. A disk that refuses is reported once."""
        if not self._lines:
            return
        lines = b"".join(self._lines)
        self._lines.clear()
        try:
            await asyncio.to_thread(self._append, lines)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("%s cannot be written: %s", self._path, error)
            self._failing = True

    async def _write_all(self) -> None:
        while True:
            await asyncio.sleep(_EVERY)
            await self.flush()

    def _append(self, lines: bytes) -> None:
        held = self._path.stat().st_size if self._path.exists() else 0
        if held and held + len(lines) > self._size:
            self._path.replace(self._path.with_name(f"{NAME}.1"))
        with self._path.open("ab") as file:
            file.write(lines)


def line(namespace: str, looked: Looked, wrong: float | None, *, with_text: bool) -> dict[str, Any]:
    """One line; label -1 says that nobody has judged the pair yet."""
    ruling = looked.ruling
    assert ruling is not None
    verdict = next((item for item in looked.verdicts if item.candidate.id == ruling.entry), None)
    figures = {
        "label": -1,
        "cat": ruling.category,
        "similarity": looked.similarity,
        "probability": ruling.p,
        "point": ruling.point if ruling.point <= 1.0 else None,
        "reason": looked.found if isinstance(looked.found, str) else None,
        "stage": None if verdict is None else verdict.stage,
        "guard": verdict.guard if verdict is not None and with_text else "",
        "wrong": wrong,
        "entry": ruling.entry,
        "time": round(time.time(), 3),
    }
    if not with_text or verdict is None:
        return figures
    texts = {"a": verdict.candidate.text[:_LONGEST], "b": looked.text[:_LONGEST], "namespace": namespace}
    return texts | figures
