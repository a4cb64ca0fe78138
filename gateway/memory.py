"""How much memory this process may take."""

from __future__ import annotations

from pathlib import Path

_DEFAULT = 2 * 2**30
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def default_budget() -> int:
    """Return 2 GiB in bytes, or a quarter of the container's limit where that is less."""
    return min([_DEFAULT, *(limit // 4 for limit in map(_limit, _LIMITS) if limit is not None)])


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
