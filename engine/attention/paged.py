"""Attention by loops of our own on CPUs: bfloat16 with AVX-512's instructions for it, float32 with AVX2; see `paged.c`.

torch computes bfloat16 attention there as it does float32's, at a fifth of the speed of its own products, and gathers
and masks before. Where its kernels use AMX they are as fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.attention import LayerPool, Packed
from engine.attention.varlen import Unavailable

NAMES: Mapping[torch.dtype, Literal["avx512", "avx2"]] = MappingProxyType(
    {torch.bfloat16: "avx512", torch.float32: "avx2"}
)
"""What it is called, after the instructions that it needs."""
_ROWS = 64
"""Query vectors of a tile, as in `paged.c`."""
_DIM = 256
"""Numbers of a head at most, as there."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step for layers with the same window."""

    tiles: Tensor
    """int32 [T, 3]: sequence, first row and rows of each, those with most keys first."""
    positions: Tensor
    tables: Tensor
    window: int
    """0: none."""
    block_size: int


class PagedBackend:
    """See the module."""

    def __init__(self, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises Unavailable."""
        if device.type != "cpu" or dtype not in NAMES:
            raise Unavailable(f"it computes in bfloat16 or float32 on a CPU, not in {dtype} on {device}")
        self.name: str = NAMES[dtype]
        if head_dim % 32 or head_dim > _DIM or heads // kv_heads > _ROWS:
            raise Unavailable(f"{heads} heads of {head_dim} for {kv_heads} of keys do not fit its tiles")
        self._loops, self._rows, self._scale = _loops(dtype), _ROWS // (heads // kv_heads), head_dim**-0.5

    def plan(self, packed: Packed, window: int | None, block_size: int) -> Plan:
        """Cut the sequences' rows into tiles."""
        tiles: list[tuple[int, int, int]] = []
        for index, (end, count) in enumerate(zip(accumulate(packed.counts), packed.counts, strict=True)):
            tiles += ((index, end - count + at, min(self._rows, count - at)) for at in range(0, count, self._rows))
        listed = np.array(tiles, dtype=np.int32)
        # The longest first: threads that are done early take what is left.
        lasts = packed.positions.numpy()[listed[:, 1] + listed[:, 2] - 1]
        listed = np.ascontiguousarray(listed[np.argsort(-lasts, kind="stable")])
        tables = packed.tables.contiguous()
        return Plan(torch.from_numpy(listed), packed.positions, tables, window or 0, block_size)

    def attend(self, queries: Tensor, pool: LayerPool, plan: Plan, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """[N, H, D] to [N, H, D]."""
        count, heads, dim = queries.shape
        if queries.stride()[1:] != (dim, 1):
            queries = queries.contiguous()
        out = queries.new_empty(count, heads, dim)
        tensors = (out, queries, pool.keys, pool.values, plan.positions, plan.tables, plan.tiles)
        self._loops.attend(
            *(tensor.data_ptr() for tensor in tensors),
            len(plan.tiles),
            queries.stride(0),
            heads,
            pool.keys.shape[2],
            dim,
            plan.block_size,
            plan.tables.shape[1],
            plan.window,
            queries.itemsize,
            self._scale,
        )
        return out


def _loops(dtype: torch.dtype) -> Any:
    """The compiled module. Raises Unavailable."""
    try:
        loops = importlib.import_module("engine.attention._paged")
    except ImportError as error:
        raise Unavailable(f"it was not compiled at installation: {error}") from error
    if not loops.able(dtype.itemsize):
        raise Unavailable(f"this processor lacks the instructions that {NAMES[dtype]} stands for")
    return loops
