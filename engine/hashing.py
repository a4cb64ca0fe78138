"""Names for blocks of tokens that say everything their keys and values depend on."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

DIGEST = 16


def origin(root: bytes, *parts: str) -> bytes:
    """What a first block is chained to: `root` names model, weights, dtype and adapter, `parts` who may share."""
    state = blake2b(digest_size=DIGEST)
    for part in (root, *(part.encode("utf-8", "surrogateescape") for part in parts)):
        state.update(struct.pack("<Q", len(part)))  # keeps the parts apart: ("ab", "c") is not ("a", "bc")
        state.update(part)
    return state.digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block of `tokens` that follows the block named `parent`; the same in every process and machine."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=DIGEST).digest()
