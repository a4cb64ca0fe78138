"""Which versions of each text are stored, from which contexts, and which one goes for a new one.

The paper that has several versions (Cache-Craft, arXiv 2502.15734) gives up what is reused least for what its repair
costs; so does this, text by text. The counts begin anew with every process.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.reuse.cachecraft import familiar, unfit
from engine.reuse.chunks import ContextIndex
from engine.reuse.known import Text


@dataclass(slots=True)
class _Version:
    context: ContextIndex | None
    uses: int = 0
    cost: float = 0.0
    """Sum of the shares that were to be repaired."""

    @property
    def worth(self) -> float:
        """Uses over their mean cost; without an index it is worth nothing."""
        return self.uses / (self.cost / self.uses + 1e-6) if self.uses and self.context is not None else 0.0


class Versions:
    """Any thread may call. Of a text `most` are kept, in one slot more: a new one is there before an old one goes."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._versions: dict[Text, dict[int, _Version]] = {}

    def add(self, text: Text, slot: int, context: ContextIndex | None) -> None:
        """It is stored from now on."""
        if context is not None:  # to choose by; what says which tokens are repaired comes with the chunk
            context = replace(context, outside=torch.empty(0))
        with self._lock:
            self._versions.setdefault(text, {})[slot] = _Version(context)

    def remove(self, text: Text, slot: int) -> None:
        """It is not any more; an unknown one is ignored."""
        with self._lock:
            versions = self._versions.get(text, {})
            versions.pop(slot, None)
            if not versions:
                self._versions.pop(text, None)

    def least(self, text: Text, prefix: Sequence[bytes], without: int | None = None) -> tuple[bool, float]:
        """What `unfit` says of the best one behind these texts but that of a slot; more than of any where none is."""
        with self._lock:
            versions = self._versions.get(text, {})
            found = (unfit(one.context, prefix) for slot, one in versions.items() if slot != without)
            return min(found, default=(True, float("inf")))

    def familiar(self, text: Text, prefix: Sequence[bytes]) -> bool:
        """Whether one is from a context like this."""
        with self._lock:
            return any(familiar(one.context, prefix) for one in self._versions.get(text, {}).values())

    def used(self, text: Text, slot: int, cost: float) -> None:
        """A prompt had it, and so large a share of it to repair."""
        with self._lock:
            if (one := self._versions.get(text, {}).get(slot)) is not None:
                one.uses += 1
                one.cost += cost

    def room(self, text: Text) -> tuple[int, int | None] | None:
        """A slot for a new version, and that of the one that goes for it; None: one that had to go is still there."""
        with self._lock:
            versions = self._versions.get(text, {})
            free = next((slot for slot in range(self._most + 1) if slot not in versions), None)
            if free is None or len(versions) < self._most:
                return None if free is None else (free, None)
            return free, min(versions, key=lambda slot: versions[slot].worth)
