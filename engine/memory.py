"""How freed memory is kept.

glibc gives every thread an arena of its own, up to eight a core, and none of what one of them frees to another. Chunks
are read, decoded and let go of on a dozen threads: while tiers failed under load, of 280 MB in sixteen arenas 60 to 140
were in use. With two there were 40 MB fewer. What is freed at the end of an arena is given back and taken again a
moment later, page by page, unless it is told to be kept.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_OPTIONS = {
    "MALLOC_ARENA_MAX": (-8, 2),
    "MALLOC_TRIM_THRESHOLD_": (-1, 64 << 20),
    "MALLOC_TOP_PAD_": (-2, 1 << 20),
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),
}
"""What each is called in the environment, where a user's word counts, and in malloc.h; the value."""


def share_freed() -> None:
    """Tell the allocator, where it is glibc's. To be called before other threads allocate."""
    with suppress(AttributeError, OSError, TypeError):  # other systems, other allocators
        mallopt = ctypes.CDLL(None).mallopt
        for name, (number, value) in _OPTIONS.items():
            if name not in os.environ:
                mallopt(number, value)
