"""How freed memory is shared.

glibc gives threads arenas of their own, up to eight a core, and none of what is freed in one serves another. Chunks are
read, decoded and let go of on a dozen threads: while tiers failed under load, 280 MB lay in sixteen arenas, of which 60
to 140 were in use. In two there were 30 to 40 fewer.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_ARENA_MAX, _ARENAS = -8, 2
"""`M_ARENA_MAX` of malloc.h, and its value."""


def share_freed() -> None:
    """Tell the allocator, where it is glibc's and `MALLOC_ARENA_MAX` does not. Before other threads allocate."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(AttributeError, OSError, TypeError):  # other systems, other allocators
            ctypes.CDLL(None).mallopt(_ARENA_MAX, _ARENAS)
