import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from gateway.embedding import EmbedderError, Embedding
from gateway.embedding.batcher import Batcher


class Encoder:
    """Answers with the text's length as a vector; can be held, and refuses the text `bad`."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()

    def __call__(self, texts: Sequence[str]) -> list[Embedding]:
        self.batches.append(list(texts))
        self.entered.set()
        assert self.free.wait(10)
        if "bad" in texts:
            raise EmbedderError("bad text")
        return [Embedding(np.array([len(text)], np.float32), truncated=False) for text in texts]

    async def hold(self, batcher: Batcher) -> "asyncio.Task[Embedding]":
        """Occupy the thread with one text until `free` is set."""
        self.free.clear()
        task = asyncio.create_task(batcher.submit("first"))
        await asyncio.to_thread(self.entered.wait, 10)
        return task


@asynccontextmanager
async def opened(encoder: Encoder, *, max_batch: int = 8, max_waiting: int = 100) -> AsyncIterator[Batcher]:
    batcher = Batcher(encoder, max_batch=max_batch, max_waiting=max_waiting)
    try:
        yield batcher
    finally:
        encoder.free.set()
        await batcher.close()


async def test_a_lone_text_runs_at_once() -> None:
    encoder = Encoder()
    async with opened(encoder) as batcher:
        assert (await batcher.submit("four")).vector[0] == 4
        assert encoder.batches == [["four"]]


async def test_what_arrives_meanwhile_goes_together_in_order_and_bounded() -> None:
    encoder = Encoder()
    async with opened(encoder, max_batch=4) as batcher:
        first = await encoder.hold(batcher)
        others = [asyncio.create_task(batcher.submit("x" * size)) for size in range(1, 7)]
        await asyncio.sleep(0)
        encoder.free.set()
        assert [(await task).vector[0] for task in (first, *others)] == [5, 1, 2, 3, 4, 5, 6]
        assert [len(batch) for batch in encoder.batches] == [1, 4, 2]


async def test_a_cancelled_waiter_is_dropped_and_the_others_are_answered() -> None:
    encoder = Encoder()
    async with opened(encoder) as batcher:
        first = await encoder.hold(batcher)
        kept, cancelled = (asyncio.create_task(batcher.submit(text)) for text in ("kept", "cancelled"))
        await asyncio.sleep(0)
        cancelled.cancel()
        first.cancel()
        await asyncio.sleep(0)
        encoder.free.set()
        assert (await kept).vector[0] == 4
        assert first.cancelled()
        assert cancelled.cancelled()
        assert encoder.batches == [["first"], ["kept"]]
        assert (await batcher.submit("later")).vector[0] == 5


async def test_one_bad_text_costs_the_others_nothing() -> None:
    encoder = Encoder()
    async with opened(encoder) as batcher:
        first = await encoder.hold(batcher)
        tasks = [asyncio.create_task(batcher.submit(text)) for text in ("a", "bad", "ccc")]
        await asyncio.sleep(0)
        encoder.free.set()
        await first
        good, bad, also_good = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(good, Embedding)
        assert isinstance(bad, EmbedderError)
        assert isinstance(also_good, Embedding)


async def test_a_full_queue_refuses() -> None:
    encoder = Encoder()
    async with opened(encoder, max_waiting=2) as batcher:
        first = await encoder.hold(batcher)
        waiting = [asyncio.create_task(batcher.submit(text)) for text in ("a", "b")]
        await asyncio.sleep(0)
        with pytest.raises(EmbedderError, match="wait for the embedder"):
            await batcher.submit("c")
        encoder.free.set()
        await asyncio.gather(first, *waiting)


async def test_closing_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    encoder = Encoder()
    async with opened(encoder, max_batch=1) as batcher:
        first = await encoder.hold(batcher)
        second = asyncio.create_task(batcher.submit("second"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        encoder.free.set()
        await closing
        assert [(await task).vector[0] for task in (first, second)] == [5, 6]
        with pytest.raises(EmbedderError, match="closed"):
            await batcher.submit("late")
        await batcher.close()


def test_a_loop_that_ends_first_leaves_no_thread() -> None:
    encoder = Encoder()

    async def abandon() -> None:
        batcher = Batcher(encoder, max_batch=8, max_waiting=8)
        task = await encoder.hold(batcher)
        task.cancel()
        threads.extend(thread for thread in threading.enumerate() if thread.name == "hitpath-embedder")

    threads: list[threading.Thread] = []
    asyncio.run(abandon())
    encoder.free.set()
    assert threads
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
