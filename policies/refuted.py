"""Pairs of questions of which one's answer was found not to serve the other: they are never brought together again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from policies.normalise import normal

_BYTES = 16
PAIRS = 16384
"""Pairs that are remembered; the one not met for longest is forgotten first."""


def pair(scope: bytes, one: str, other: str) -> bytes:
    """The name of a pair of questions in a scope, whichever was asked first and however they are typed."""
    name = blake2b(scope, digest_size=_BYTES)
    for text in sorted((normal(one) or one, normal(other) or other)):
        raw = text.encode("utf-8", "surrogatepass")
        name.update(len(raw).to_bytes(8, "big") + raw)
    return name.digest()


class Refuted:
    """The pairs found wrong: bounded, and asked in a microsecond."""

    def __init__(self, most: int = PAIRS) -> None:
        self._most = most
        self._pairs: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        """Pairs remembered."""
        return len(self._pairs)

    def __contains__(self, pair: bytes) -> bool:
        """Whether a pair was found wrong; a pair that is met is remembered longer."""
        if pair not in self._pairs:
            return False
        self._pairs.move_to_end(pair)
        return True

    def add(self, pair: bytes) -> None:
        """Remember a pair."""
        self._pairs[pair] = None
        self._pairs.move_to_end(pair)
        if len(self._pairs) > self._most:
            self._pairs.popitem(last=False)

    def plain(self) -> list[str]:
        """The state in JSON's own types."""
        return [pair.hex() for pair in self._pairs]

    @classmethod
    def restored(cls, plain: Iterable[str], most: int = PAIRS) -> Refuted:
        """Take a state up again. Raises ValueError when it is not one."""
        found = cls(most)
        try:
            pairs = [bytes.fromhex(name) for name in plain]
        except TypeError as error:
            raise ValueError(f"not a list of pairs: {error}") from error
        if any(len(item) != _BYTES for item in pairs):
            raise ValueError("a pair's name has another length")
        for item in pairs:
            found.add(item)
        return found
