"""What a killed process and a full disk leave behind, for real."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachestore.offline import verify
from tests.cachestore.samples import digest, document, open_store

PUTS = """
import asyncio, sys
from pathlib import Path
from tests.cachestore.samples import document, open_store

async def main(directory, first):
    store = await open_store(Path(directory))
    async def keep(n):
        # Every third document replaces an earlier one.
        name = n if n % 3 else n // 2
        outcome = await store.put(document(name, body=body(n)))
        print(name, n, outcome, flush=True)
    def body(n):
        return f"{n} ".encode() * (1 + n % 500)
    n = first
    while True:
        await asyncio.gather(*(keep(i) for i in range(n, n + 20)))
        n += 20

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""

LIMITED = """
import asyncio, resource, signal, sys
from pathlib import Path
from policies.reasons import NotStored
from tests.cachestore.samples import digest, document, open_store

async def main(directory):
    store = await open_store(Path(directory), retry_after=3600.0)
    stored, outcome, n = [], 0, 0
    while isinstance(outcome, int):
        body = b"".join(digest((n, i)) for i in range(100))
        outcome = await store.put(document(n, body=body))
        if isinstance(outcome, int):
            stored.append((n, body))
        n += 1
    assert outcome is NotStored.DISK_FULL, outcome
    assert len(stored) > 10
    for n, body in stored:
        hit = await store.get(document(n).key)
        assert hit is not None and hit.body == body
    assert store.stats().storing_off
    assert await store.check() == []
    await store.close()
    print(len(stored))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
asyncio.run(main(sys.argv[1]))
"""


def body(n: int) -> bytes:
    return f"{n} ".encode() * (1 + n % 500)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, seed: int) -> None:
    acknowledged: dict[int, int] = {}
    for run in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", PUTS, str(tmp_path), str(10_000 * run)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(random.Random(seed * 10 + run).uniform(0.0, 0.3))
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().splitlines()
        child.stdout.close()
        child.wait()
        for line in lines:
            parts = line.split()
            # The last line may have been cut by the kill.
            if len(parts) == 3 and parts[2].isdigit():
                acknowledged[int(parts[0])] = max(int(parts[1]), acknowledged.get(int(parts[0]), 0))
        assert acknowledged
        asyncio.run(everything_is_there(tmp_path, acknowledged))


async def everything_is_there(directory: Path, acknowledged: dict[int, int]) -> None:
    store = await open_store(directory)
    assert await store.check() == []
    for name, n in acknowledged.items():
        hit = await store.get(digest(name))
        assert hit is not None
        written = int(hit.body.split(b" ", 1)[0])
        assert written >= n, "an older answer than the acknowledged one"
        assert hit.body == body(written), "half an answer"
        stored = document(name).vector
        assert stored is not None
        assert store.search(digest("scope"), stored, 1, 0.99)[0].id == hit.id
    await store.close()
    assert await asyncio.to_thread(verify, directory) == []


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    stored = int(done.stdout)
    assert verify(tmp_path) == []

    async def reopen() -> None:
        store = await open_store(tmp_path)
        assert store.stats().entries == stored
        assert await store.check() == []
        await store.close()

    asyncio.run(reopen())
