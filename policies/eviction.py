"""Which entries to give up when a budget is full.

An evictor remembers what it needs in arrays indexed by *slot*: a small number that the store gives each entry and uses
again once the entry is gone. So 100 000 entries cost a few megabytes and no object each. Victims are found by drawing a
sample and ranking it: the price of an eviction does not depend on how many entries there are, and with a few hundred
entries or fewer the sample is everything, so the order is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class Evictor(Protocol):
    """Ranks entries by how little would be lost with them. Time is an argument, in seconds, and never goes back."""

    def admit(self, slot: int, category: str, *, size: int, cost: float, now: float) -> None:
        """Learn of an entry of `size` bytes whose next hit would save `cost` seconds."""
        ...

    def touch(self, slot: int, now: float, hits: int = 1) -> None:
        """The entry was hit; an unknown slot is ignored."""
        ...

    def forget(self, slot: int) -> None:
        """The entry is gone, the slot may come back as another; an unknown slot is ignored."""
        ...

    def victims(self, rounds: Sequence[Mapping[str, int]], sizes: Slots, need: int, now: float) -> list[int]:
        """Slots to give up, the least worth first, until they add up to `need` bytes or nothing more may be taken.

        `sizes[slot]` is what giving up a slot frees. `rounds` say how many bytes may be taken from which category
        (see `policies.quota.allowances`); a category that is not named is protected. An entry larger than what is left
        of its category's allowance stays.
        """
        ...

    def __len__(self) -> int:
        """How many entries are known."""
        ...


_SAMPLE = 512
_DRAWS = 16
"""Slots drawn per victim wanted: the worst of 16 comes close to the worst of all."""


class _Sampling(ABC):
    """Book-keeping by category and the drawing of samples; the ranking is left to the policy."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._names: dict[str, int] = {}
        self._members: list[array[int]] = []
        self._group = np.zeros(0, np.int32)
        """By slot: one more than the index of its category, 0 when the slot is unknown."""
        self._place = np.zeros(0, np.int64)
        """By slot: where it stands among its category's members."""

    def __len__(self) -> int:
        return sum(map(len, self._members))

    def admit(self, slot: int, category: str, *, size: int, cost: float, now: float) -> None:
        self.forget(slot)
        if slot >= len(self._group):
            self._grow(max(64, slot + 1, len(self._group) * 5 // 4))
        group = self._names.setdefault(category, len(self._names))
        if group == len(self._members):
            self._members.append(array("q"))
        members = self._members[group]
        self._group[slot] = group + 1
        self._place[slot] = len(members)
        members.append(slot)
        self._begin(slot, size, cost, now)

    def forget(self, slot: int) -> None:
        if not self._knows(slot):
            return
        members = self._members[self._group[slot] - 1]
        last = members.pop()
        if last != slot:
            place = int(self._place[slot])
            members[place] = last
            self._place[last] = place
        self._group[slot] = 0

    def touch(self, slot: int, now: float, hits: int = 1) -> None:
        if self._knows(slot):
            self._hit(slot, now, hits)

    def victims(self, rounds: Sequence[Mapping[str, int]], sizes: Slots, need: int, now: float) -> list[int]:
        taken: dict[int, None] = {}
        for round_ in rounds:
            left = {self._names[name] + 1: room for name, room in round_.items() if room > 0 and name in self._names}
            while need > 0 and left:
                before = len(taken)
                need = self._take(left, taken, sizes, need, now)
                if len(taken) == before:
                    break
        return list(taken)

    def _take(self, left: dict[int, int], taken: dict[int, None], sizes: Slots, need: int, now: float) -> int:
        """Draw a sample, move the least valuable of it to `taken`, return the bytes still needed."""
        sample = self._sample(left, sizes, need)
        order = np.lexsort((sample, self._values(sample, now)))
        # Of a drawn sample only the lowest part is trusted; a sample that holds everything is used to its end.
        drawn = len(sample) < sum(len(self._members[group - 1]) for group in left)
        trusted = max(1, len(sample) // _DRAWS) if drawn else len(sample)
        for slot in sample[order].tolist():
            if need <= 0 or trusted == 0:
                break
            group, size = int(self._group[slot]), int(sizes[slot])
            if slot in taken or size > left[group]:
                continue
            taken[slot] = None
            left[group] -= size
            need -= size
            trusted -= 1
        return need

    def _sample(self, left: Mapping[int, int], sizes: Slots, need: int) -> Slots:
        """Slots of the groups that may be taken from: all when they are few, else a draw."""
        groups = [np.frombuffer(self._members[group - 1], np.int64) for group in left if self._members[group - 1]]
        if not groups:
            return np.zeros(0, np.int64)
        total = sum(map(len, groups))
        typical = max(1.0, float(np.mean([sizes[group[:32]].mean() for group in groups])))
        wanted = max(_SAMPLE, int(_DRAWS * need / typical))
        if total <= wanted:
            return np.concatenate(groups)
        shares = self._random.multinomial(wanted, [len(group) / total for group in groups])
        picks = [group[self._random.integers(len(group), size=n)] for group, n in zip(groups, shares, strict=True)]
        picked: Slots = np.unique(np.concatenate(picks))
        return picked

    def _knows(self, slot: int) -> bool:
        return slot < len(self._group) and bool(self._group[slot])

    def _grow(self, length: int) -> None:
        for column in self._columns():
            column.resize(length, refcheck=False)

    def _columns(self) -> list[NDArray[np.generic]]:
        """Every array that is indexed by slot."""
        return [self._group, self._place]

    @abstractmethod
    def _begin(self, slot: int, size: int, cost: float, now: float) -> None:
        """Start an entry's record."""

    @abstractmethod
    def _hit(self, slot: int, now: float, hits: int) -> None:
        """Note hits in the entry's record."""

    @abstractmethod
    def _values(self, slots: Slots, now: float) -> NDArray[np.float64]:
        """What would be lost with each: the lowest goes first."""


class Lru(_Sampling):
    """Gives up what was not used for longest."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._used = np.zeros(0)

    def _columns(self) -> list[NDArray[np.generic]]:
        return [*super()._columns(), self._used]

    def _begin(self, slot: int, size: int, cost: float, now: float) -> None:
        self._used[slot] = now

    def _hit(self, slot: int, now: float, hits: int) -> None:
        self._used[slot] = now

    def _values(self, slots: Slots, now: float) -> NDArray[np.float64]:
        return self._used[slots]


class ValuePerByte(_Sampling):
    """Gives up what promises least per byte: (how often it is hit, fading with time) x (seconds a hit saves) / bytes.

    A new entry counts as one hit, so that it gets its chance; every `half_life` seconds a past hit counts half.
    """

    def __init__(self, seed: int = 0, half_life: float = 3600.0) -> None:
        super().__init__(seed)
        self._decay = np.log(2.0) / half_life
        self._used = np.zeros(0)
        self._hits = np.zeros(0, np.float32)
        self._worth = np.zeros(0, np.float32)

    def _columns(self) -> list[NDArray[np.generic]]:
        return [*super()._columns(), self._used, self._hits, self._worth]

    def _begin(self, slot: int, size: int, cost: float, now: float) -> None:
        self._used[slot] = now
        self._hits[slot] = 1.0
        # Even what cost nothing to generate saved a round trip: a millisecond keeps the order by bytes and hits.
        self._worth[slot] = max(cost, 1e-3) / max(size, 1)

    def _hit(self, slot: int, now: float, hits: int) -> None:
        self._hits[slot] = self._hits[slot] * np.exp(-self._decay * (now - self._used[slot])) + hits
        self._used[slot] = now

    def _values(self, slots: Slots, now: float) -> NDArray[np.float64]:
        faded = self._hits[slots] * np.exp(-self._decay * (now - self._used[slots]))
        return np.asarray(faded * self._worth[slots], np.float64)
