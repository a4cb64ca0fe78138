"""Decoding as CUDA graphs: one launch a step instead of hundreds.

A graph repeats the same kernels on the same memory, so a step's inputs are copied into buffers that stay, padded to
the next captured batch size. Padding rows write into a block that belongs to nobody and read one key of it: the pool
must have one block more than may be handed out. Whatever is not decoding alone runs as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import AttentionBackend, KvPool, Packed
from engine.model import Decoder

CAPTURABLE = frozenset({"triton", "varlen"})
"""Backends that plan a decoding step without the device, and read lengths there and not on the host."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A computation that can be repeated."""

    replay: Callable[[], None]
    """Compute again from what the inputs hold now."""
    result: Tensor
    """Where the result is, after each replay."""


Record = Callable[[Callable[[], Tensor]], Recording]


class CudaRecorder:
    """Captures computations as CUDA graphs that share their scratch memory."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Recording:
        """Run once outside the graph, so that libraries set themselves up and kernels are compiled, then capture."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = compute()
        return Recording(graph.replay, result)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Sizes to capture, ascending: dense where padding would cost most; `most` is the last."""
    return (*(size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most), most)


class DecodeGraphs:
    """The model's decoding step at a few batch sizes."""

    def __init__(
        self,
        model: Decoder,
        pool: KvPool,
        backend: AttentionBackend,
        *,
        context: int,
        most: int,
        scratch: int,
        record: Record | None = None,
    ) -> None:
        """Captures at once. `most`: sequences decoding together; `scratch`: the block that belongs to nobody.

        Raises ValueError for a backend that cannot be captured, torch.OutOfMemoryError where memory is short.
        """
        if backend.name not in CAPTURABLE:
            raise ValueError(f"attention backend {backend.name!r} cannot be captured in a CUDA graph")
        self._model, self._pool, self._backend = model, pool, backend
        self._context, self._scratch = context, scratch
        self._sizes = batch_sizes(most)
        device = model.weights.embedding.device
        width = -(-context // pool.block_size)
        self._ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._slots = torch.full_like(self._ids, scratch * pool.block_size)
        self._spans = torch.ones_like(self._ids) if model.rope.stretches else None
        self._lengths = torch.ones(most, dtype=torch.int32, device=device)
        self._tables = torch.full((most, width), scratch, dtype=torch.int32, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, device=device)
        record = record or CudaRecorder()
        # The largest first: what smaller ones need then fits into the memory that it took.
        self._recordings = {size: record(self._computation(size)) for size in reversed(self._sizes)}

    def fits(self, packed: Packed) -> bool:
        """Whether a step is decoding alone, and every sequence's scores are wanted."""
        batch = len(packed.counts)
        return (
            batch <= self._sizes[-1]
            and max(packed.counts) == 1
            and len(packed.drawing) == batch
            and packed.tables.shape[1] <= self._tables.shape[1]
        )

    def scores(self, packed: Packed) -> Tensor:
        """Scores [B, V] of a step that `fits`, in the order of its sequences; the next call overwrites them."""
        batch = len(packed.counts)
        size = next(size for size in self._sizes if size >= batch)
        self._load(packed, batch)
        if size > batch:
            self._pad(slice(batch, size))
        recording = self._recordings[size]
        recording.replay()
        return recording.result[:batch]

    def _load(self, packed: Packed, batch: int) -> None:
        self._ids[:batch].copy_(packed.ids)
        self._positions[:batch].copy_(packed.positions)
        self._slots[:batch].copy_(packed.slots)
        self._lengths[:batch].copy_(packed.lengths)
        # Behind the last block of a row an earlier step's numbers stay: blocks all the same, and never looked at.
        self._tables[:batch, : packed.tables.shape[1]].copy_(packed.tables)
        if self._spans is not None and packed.spans is not None:
            self._spans[:batch].copy_(packed.spans)

    def _pad(self, rows: slice) -> None:
        self._positions[rows] = 0
        self._slots[rows] = self._scratch * self._pool.block_size
        self._lengths[rows] = 1
        self._tables[rows, 0] = self._scratch

    def _computation(self, size: int) -> Callable[[], Tensor]:
        packed = Packed(
            ids=self._ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            tables=self._tables[:size],
            starts=self._starts[: size + 1],
            lengths=self._lengths[:size],
            counts=(1,) * size,
            # What is planned on the host must serve every length that may come.
            totals=(self._context,) * size,
            drawing=self._rows[:size],
            spans=None if self._spans is None else self._spans[:size],
        )
        return lambda: self._model.logits(self._model.forward(packed, self._pool, self._backend))
