"""Tiers that cannot be had are said, not missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cachestore.kv import Options, Tiers, open_store
from tests.cachestore.kv.samples import GEOMETRY, chunk, loaded, stored

ROOT = Path(__file__).parents[3]


def test_memory_alone_needs_nothing() -> None:
    opened = open_store(GEOMETRY, Tiers(memory=1 << 20), Options(capacity=1 << 30))
    assert opened.note is None
    stored(opened.store, *(chunk(seed, 500) for seed in range(4)))
    assert opened.store.stats().bytes <= 1 << 20
    assert loaded(opened.store, chunk(3, 500)) != [None]
    opened.store.close()


def test_without_lmcache_there_is_memory_and_a_word_about_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['lmcache'] = None\n"
        "from pathlib import Path\n"
        "from cachestore.kv import Options, Tiers, open_store\n"
        "from tests.cachestore.kv.samples import GEOMETRY, chunk, loaded, stored\n"
        "opened = open_store(GEOMETRY, Tiers(1 << 20, Path(sys.argv[1])), Options(capacity=1 << 30))\n"
        "stored(opened.store, chunk(1)); print(loaded(opened.store, chunk(1)) != [None], opened.note)\n"
        "opened.store.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("True no disk or Redis tier for stored keys and values: ")
    assert list(tmp_path.iterdir()) == []
