"""Attention through Hitpath's own Triton kernels: paged, packed, GQA heads together, long contexts split.

Sequences with one new token go to the decoding kernel, which splits their keys over the processors (flash decoding);
all others go tile by tile to the kernel for prompts, which goes by each token's position, so that tokens between may be
left out. Planning reads host lists only, and copies to the device only
where a step is mixed: a step of decodes alone can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from engine import kernels
from engine.attention import LayerPool, Packed

_MOST_SPLITS = 64
_WAVES = 2
"""Programs of the decoding kernel that a processor has room for."""
_LONGEST = 16_384
"""No stretch of keys is longer, so that one long sequence among many is not the last to end by far. Captured steps are
planned for the longest context there may be, and a program without keys costs about a microsecond: hence not less."""
_SHORTEST = 128


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes of tiles for one kind of number and head size, chosen so that Hopper's registers and memory hold them."""

    rows: int
    """Queries times heads of a prompt's tile."""
    columns: int
    """Keys of a tile."""
    warps: int
    stages: int


def tuning(dtype: torch.dtype, head_dim: int, *, shared_memory: int) -> Tuning:
    """Static, so that no request ever waits for a search. `shared_memory`: bytes that a block of threads may have."""
    if dtype is torch.float32:
        return Tuning(rows=32, columns=16, warps=4, stages=2)
    if head_dim > 128:
        return Tuning(rows=64, columns=32, warps=4, stages=3)
    # Keys are found through a table, so of five stages two are tiles on their way. On cards with less memory: one.
    stages = 5 if shared_memory >= 140_000 else 3
    return Tuning(rows=128, columns=64, warps=4 if head_dim <= 64 else 8, stages=stages)


def splits_for(sequences: int, kv_heads: int, longest: int, processors: int) -> int:
    """Into how many stretches the keys of each decoding sequence are cut; `longest` in tokens. At most 64."""
    wanted = max(-(-_WAVES * processors // (sequences * kv_heads)), -(-longest // _LONGEST))
    return max(1, min(wanted, -(-longest // _SHORTEST), _MOST_SPLITS))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step for layers with the same window."""

    packed: Packed
    window: int
    """0 where there is none."""
    members: Tensor
    """int32: sequences with one new token."""
    decodes: int
    splits: int
    partial: Tensor | None
    """float32 [decodes, H, splits, D]: scratch that all layers share, as is `levels` [decodes, H, splits]."""
    levels: Tensor | None
    tiles: Tensor | None
    """int32 [T, 2]: sequence and first row of every tile of prompts."""


class TritonBackend:
    """See the module. One model's heads, head size and kind of numbers."""

    name = "triton"

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        tuned: Tuning | None = None,
    ) -> None:
        """`tuned`: other tiles than `tuning` chooses, to measure them."""
        device = torch.device(device)
        self._heads, self._kv_heads, self._dim = heads, kv_heads, head_dim
        self._group = heads // kv_heads
        self._padded = triton.next_power_of_2(self._group)
        self._block_d = max(16, triton.next_power_of_2(head_dim))
        self._scale = math.log2(math.e) / math.sqrt(head_dim)
        # Without a GPU the kernels are interpreted, and 8 makes splits as likely as on a real one.
        card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self._processors = card.multi_processor_count if card else 8
        memory = getattr(card, "shared_memory_per_block_optin", 0)
        self._tuning = tuned or tuning(dtype, self._block_d, shared_memory=memory)

    def plan(self, packed: Packed, window: int | None, block_size: int) -> Plan:
        """Tell decodes from prompts, cut prompts into tiles, choose the splits."""
        singles = [index for index, count in enumerate(packed.counts) if count == 1]
        alone = len(singles) == len(packed.counts)
        # Of a step of decodes the starts are 0, 1, 2, …: the sequences themselves.
        members = packed.starts[:-1] if alone else _on_device(singles, packed)
        splits, partial, levels = 1, None, None
        if singles:
            longest = max(packed.totals[index] for index in singles)
            longest = longest if window is None else min(longest, window)
            splits = splits_for(len(singles), self._kv_heads, longest, self._processors)
        if splits > 1:
            shape = (len(singles), self._heads, splits)
            partial = torch.empty((*shape, self._dim), dtype=torch.float32, device=packed.ids.device)
            levels = torch.empty(shape, dtype=torch.float32, device=packed.ids.device)
        tiles = None if alone else _on_device(self._tiles(packed), packed)
        return Plan(packed, window or 0, members, len(singles), splits, partial, levels, tiles)

    def attend(self, queries: Tensor, pool: LayerPool, plan: Plan, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """[N, H, D] to [N, H, D]. Heads of a token of `queries` must lie side by side."""
        assert queries.stride()[1:] == (self._dim, 1)
        assert pool.keys.is_contiguous()
        assert pool.values.is_contiguous()
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        if plan.decodes:
            self._decode(queries, pool, plan, out)
        if plan.tiles is not None:
            self._prefill(queries, pool, plan, plan.tiles, out)
        return out

    def _tiles(self, packed: Packed) -> list[tuple[int, int]]:
        """Sequence and first row of every tile, those with most keys first: they take longest."""
        step = max(1, self._tuning.rows // self._padded)
        tiles, start = [], 0
        for index, (count, total) in enumerate(zip(packed.counts, packed.totals, strict=True)):
            if count > 1:
                tiles += [(total - count + first, index, start + first) for first in range(0, count, step)]
            start += count
        return [(index, row) for _, index, row in sorted(tiles, reverse=True)]

    def _prefill(self, queries: Tensor, pool: LayerPool, plan: Plan, tiles: Tensor, out: Tensor) -> None:
        packed, tuned = plan.packed, self._tuning
        kernels.prefill[(self._kv_heads, len(tiles))](
            queries,
            pool.keys,
            pool.values,
            out,
            packed.positions,
            packed.starts,
            packed.tables,
            tiles,
            self._scale,
            packed.tables.stride(0),
            STRIDE_Q=queries.stride(0),
            STRIDE_OUT=out.stride(0),
            ROW=self._kv_heads * self._dim,
            GROUP=self._group,
            PADDED=self._padded,
            SIZE=pool.keys.shape[1],
            DIM=self._dim,
            WINDOW=plan.window,
            BLOCK_M=max(tuned.rows, self._padded),
            BLOCK_N=tuned.columns,
            BLOCK_D=self._block_d,
            num_warps=tuned.warps,
            num_stages=tuned.stages,
        )

    def _decode(self, queries: Tensor, pool: LayerPool, plan: Plan, out: Tensor) -> None:
        packed = plan.packed
        whole = plan.partial is None
        kernels.decode[(plan.decodes, self._kv_heads, plan.splits)](
            queries,
            pool.keys,
            pool.values,
            out,
            out if whole else plan.partial,
            out if whole else plan.levels,
            packed.lengths,
            packed.starts,
            packed.tables,
            plan.members,
            self._scale,
            packed.tables.stride(0),
            plan.splits,
            STRIDE_Q=queries.stride(0),
            STRIDE_OUT=out.stride(0),
            ROW=self._kv_heads * self._dim,
            GROUP=self._group,
            SIZE=pool.keys.shape[1],
            DIM=self._dim,
            WINDOW=plan.window,
            WHOLE=whole,
            BLOCK_M=max(16, self._padded),
            BLOCK_N=self._tuning.columns,
            BLOCK_D=self._block_d,
            num_warps=4,
            num_stages=self._tuning.stages,
        )
        if not whole:
            kernels.reduce[(plan.decodes, self._heads)](
                plan.partial,
                plan.levels,
                out,
                packed.starts,
                plan.members,
                plan.splits,
                STRIDE_OUT=out.stride(0),
                DIM=self._dim,
                BLOCK_D=self._block_d,
                MOST=_MOST_SPLITS,
                num_warps=4,
            )


def _on_device(numbers: list[int] | list[tuple[int, int]], packed: Packed) -> Tensor:
    """int32, copied without waiting for the device."""
    device = packed.ids.device
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
