"""Refreshes are bounded, one a key, and end with their owner."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import BackendTimeoutError
from gateway.refresh import Refreshes


async def test_one_refresh_of_a_key_at_a_time_and_so_many_in_all() -> None:
    refreshes, gate = Refreshes(most=2), asyncio.Event()
    begun: list[bytes] = []

    def work(key: bytes) -> bool:
        async def fetch() -> None:
            begun.append(key)
            await gate.wait()

        return refreshes.begin(key, fetch)

    assert [work(key) for key in (b"a", b"a", b"b", b"c")] == [True, False, True, False]
    await asyncio.sleep(0)
    assert begun == [b"a", b"b"]
    gate.set()
    while len(refreshes):
        await asyncio.sleep(0)
    assert work(b"a")
    await refreshes.close()
    assert len(refreshes) == 0


@pytest.mark.parametrize("error", [BackendTimeoutError("too slow"), ValueError("a fault of ours")])
async def test_a_refresh_that_fails_is_over(error: Exception) -> None:
    refreshes = Refreshes()

    async def fetch() -> None:
        raise error

    assert refreshes.begin(b"a", fetch)
    while len(refreshes):
        await asyncio.sleep(0)
    assert refreshes.begin(b"a", fetch)
    await refreshes.close()


async def test_closing_cancels_what_is_under_way() -> None:
    refreshes, ended = Refreshes(), asyncio.Event()

    async def fetch() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    refreshes.begin(b"a", fetch)
    await asyncio.sleep(0)
    await refreshes.close()
    assert ended.is_set()
