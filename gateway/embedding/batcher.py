"""Micro-batching on a thread of its own: a lone text runs at once, what arrives meanwhile goes together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from gateway.embedding import EmbedderError, Embedding

Encode = Callable[[Sequence[str]], list[Embedding]]
_Waiter = tuple[str, "asyncio.Future[Embedding]"]


class Batcher:
    """Belongs to the event loop it was made in; `submit` and `close` are called from that loop only.

    The thread takes what waits by itself instead of being handed batches by the loop: under load it never stands idle
    until the loop has time, and the loop is woken once per batch.
    """

    def __init__(self, encode: Encode, *, max_batch: int, max_waiting: int) -> None:
        self._encode = encode
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Waiter | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="hitpath-embedder", daemon=True)
        self._thread.start()

    async def submit(self, text: str) -> Embedding:
        """Embed one text. Raises EmbedderError, also when too many wait already or after `close`."""
        if self._closed:
            raise EmbedderError("the embedder is closed")
        if self._queue.qsize() >= self._max_waiting:
            raise EmbedderError(f"{self._max_waiting} texts wait for the embedder already")
        future: asyncio.Future[Embedding] = self._loop.create_future()
        self._queue.put((text, future))
        return await future

    async def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            self._loop_soon(_deliver, batch, self._answers(batch))

    def _take(self) -> list[_Waiter] | None:
        """Wait for one, then take what else is there; None when it is over."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < self._max_batch:
            try:
                waiter = self._queue.get_nowait()
            except Empty:
                break
            if waiter is None:
                self._queue.put(None)  # after this batch
                break
            batch.append(waiter)
        # Reading `cancelled` from here is only a hint: what is cancelled later is computed in vain and dropped.
        return [waiter for waiter in batch if not waiter[1].cancelled()]

    def _answers(self, batch: Sequence[_Waiter]) -> list[Embedding | EmbedderError]:
        texts = [text for text, _ in batch]
        try:
            return [*self._encode(texts)]
        except EmbedderError as error:
            if len(batch) == 1:
                return [error]
        # One bad text must not cost the others their answer.
        return [answer for waiter in batch for answer in self._answers([waiter])]

    def _loop_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed, and with it everyone who waited
            self._queue.put(None)


def _deliver(batch: Sequence[_Waiter], answers: Sequence[Embedding | EmbedderError]) -> None:
    for (_, future), answer in zip(batch, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, EmbedderError):
            future.set_exception(answer)
        else:
            future.set_result(answer)
