"""Which chunks are kept, how many bytes they take, and which go first. No I/O, no clock: order is order of use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

Key = tuple[str, bytes]
"""Salt of the tenant, name of the chunk."""


@dataclass(slots=True)
class _Entry:
    size: int
    pins: int = 0


class Ledger:
    """Bytes by tenant, least recently used first. What is pinned is not given up."""

    def __init__(self, capacity: int, quota: int | None = None) -> None:
        """`capacity` in bytes over all tenants, `quota` in bytes for each; None means only the capacity bounds."""
        if capacity < 0 or (quota is not None and quota < 0):
            raise ValueError(f"no ledger holds {capacity} bytes, {quota} of each tenant")
        self.capacity, self.quota = capacity, quota
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._used: dict[str, int] = {}
        self.total = 0
        """Bytes of all entries."""

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        """All entries, the one to go first at the front."""
        return iter(self._entries)

    def size(self, key: Key) -> int:
        """Bytes of an entry; 0 if it is not known."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.size

    def used(self, salt: str) -> int:
        """Bytes of one tenant."""
        return self._used.get(salt, 0)

    def fits(self, size: int) -> bool:
        """Whether an entry of that size could be held at all."""
        return size <= min(self.capacity, self.capacity if self.quota is None else self.quota)

    def admit(self, key: Key, size: int) -> list[Key] | None:
        """Enter it as the newest; what had to go for it, already forgotten. None, with nothing changed: no room."""
        victims = self._victims(key, size)
        if victims is None:
            return None
        for victim in victims:
            self.forget(victim)
        pins = self._entries[key].pins if key in self._entries else 0
        self.forget(key)
        self._entries[key] = _Entry(size, pins)
        self._account(key, size)
        return victims

    def touch(self, key: Key) -> None:
        """It was used; an unknown one is ignored."""
        if key in self._entries:
            self._entries.move_to_end(key)

    def forget(self, key: Key) -> None:
        """It is gone; an unknown one is ignored."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._account(key, -entry.size)

    def give_up(self, size: int) -> list[Key]:
        """Forget entries, the least recently used first, until so many bytes are free or only pinned ones are left."""
        victims: list[Key] = []
        for key, entry in list(self._entries.items()):
            if size <= 0:
                break
            if not entry.pins:
                victims.append(key)
                size -= entry.size
                self.forget(key)
        return victims

    def pin(self, key: Key) -> None:
        """It stays until `unpin`; an unknown one is ignored."""
        if (entry := self._entries.get(key)) is not None:
            entry.pins += 1

    def unpin(self, key: Key) -> None:
        """Undo one `pin`; an entry that was forgotten meanwhile, or came back, is left alone."""
        entry = self._entries.get(key)
        if entry is not None and entry.pins:
            entry.pins -= 1

    def pinned(self) -> int:
        """Pins of all entries."""
        return sum(entry.pins for entry in self._entries.values())

    def check(self) -> list[str]:
        """What does not add up; nothing, unless this code is wrong."""
        used: dict[str, int] = {}
        for (salt, _), entry in self._entries.items():
            if entry.size:
                used[salt] = used.get(salt, 0) + entry.size
        wrong = []
        if used != self._used or sum(used.values()) != self.total:
            wrong.append(f"the ledger counts {self._used} ({self.total} bytes), its entries are {used}")
        if self.total > self.capacity:
            wrong.append(f"{self.total} bytes are kept where {self.capacity} may be")
        wrong += [
            f"{size} bytes are kept for {salt}, its quota is {self.quota}"
            for salt, size in used.items()
            if self.quota is not None and size > self.quota
        ]
        return wrong

    def _victims(self, key: Key, size: int) -> list[Key] | None:
        """Entries to give up for one of `size`: first the tenant's own down to its quota, then anyone's."""
        held = self.size(key)
        over = 0 if self.quota is None else self.used(key[0]) - held + size - self.quota
        excess = self.total - held + size - self.capacity
        victims: dict[Key, None] = {}
        for mine in (True, False):
            for other, entry in self._entries.items():
                need = over if mine else excess
                if need <= 0:
                    break
                if entry.pins or other == key or other in victims or (mine and other[0] != key[0]):
                    continue
                victims[other] = None
                excess -= entry.size
                over -= entry.size if other[0] == key[0] else 0
        return list(victims) if over <= 0 and excess <= 0 else None

    def _account(self, key: Key, size: int) -> None:
        self.total += size
        self._used[key[0]] = self._used.get(key[0], 0) + size
        if not self._used[key[0]]:
            del self._used[key[0]]
