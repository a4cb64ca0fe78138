"""Random packed steps over a paged pool, and what attention must give for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from engine.attention import LayerPool, Packed

Layout = Literal["adjacent", "scattered", "shared"]


@dataclass(frozen=True)
class Shape:
    """Of one model's attention."""

    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    block_size: int = 4
    window: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass(frozen=True, eq=False)
class Sample:
    """A step whose new keys and values are in the pool already."""

    packed: Packed
    pool: LayerPool
    queries: Tensor
    fresh: tuple[Tensor, Tensor]


def sample(
    shape: Shape,
    mix: list[tuple[int, int]],
    *,
    layout: Layout = "scattered",
    every: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> Sample:
    """Sequences of (tokens already in the pool, new tokens), in this order.

    New tokens are the last of `every` so many; those between are in the pool too.
    """
    generator = torch.Generator().manual_seed(seed)
    size = shape.block_size
    counts = tuple(count for _, count in mix)
    totals = tuple(before + every * count for before, count in mix)
    firsts = tuple(before + every - 1 for before, _ in mix)
    mix = [(before, total - before) for (before, _), total in zip(mix, totals, strict=True)]
    rows = _tables(mix, size, layout, generator)
    blocks = 1 + max(block for row in rows for block in row)
    width = max(len(row) for row in rows) + 1
    tables = torch.tensor([row + [blocks - 1] * (width - len(row)) for row in rows], dtype=torch.int32)
    positions = torch.cat([torch.arange(first, total, every) for first, total in zip(firsts, totals, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(mix)), torch.tensor(counts))
    slots = tables[owners, positions // size].long() * size + positions % size
    ends = list(accumulate(counts))

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(shape.dtype).to(device)

    pool = LayerPool(*(random(blocks, size, shape.kv_heads, shape.dim) for _ in range(2)))
    # As the model does: queries are a part of a wider row.
    turned = random(len(positions), shape.heads + shape.kv_heads, shape.dim)
    fresh = (turned[:, shape.heads :], random(len(positions), shape.kv_heads, shape.dim))
    pool.write(slots.to(device), *fresh)
    packed = Packed(
        ids=torch.zeros_like(positions).to(device),
        positions=positions.to(device),
        slots=slots.to(device),
        tables=tables.to(device),
        starts=torch.tensor([0, *ends], dtype=torch.int32).to(device),
        lengths=torch.tensor(totals, dtype=torch.int32).to(device),
        counts=counts,
        totals=totals,
        drawing=torch.tensor([end - 1 for end in ends]).to(device),
        firsts=firsts if every > 1 else None,
    )
    return Sample(packed, pool, turned[:, : shape.heads], fresh)


def _tables(mix: list[tuple[int, int]], size: int, layout: Layout, generator: torch.Generator) -> list[list[int]]:
    """Blocks of every sequence; with `shared`, all read the first one's finished blocks where they have as many."""
    needs = [-(-(before + count) // size) for before, count in mix]
    numbers = torch.arange(1, 1 + sum(needs))
    if layout != "adjacent":
        numbers = numbers[torch.randperm(len(numbers), generator=generator)]
    free = iter(numbers.tolist())
    rows = [[next(free) for _ in range(need)] for need in needs]
    if layout == "shared":
        for row, (before, _) in zip(rows[1:], mix[1:], strict=True):
            common = min(before, mix[0][0]) // size
            row[:common] = rows[0][:common]
    return rows


def expected(shape: Shape, step: Sample) -> Tensor:
    """The plain formula, sequence by sequence in float64: [N, H, D]."""
    packed, pieces = step.packed, []
    ends = list(accumulate(packed.counts))
    for index, (end, count, total) in enumerate(zip(ends, packed.counts, packed.totals, strict=True)):
        slots = [
            int(packed.tables[index, j // shape.block_size]) * shape.block_size + j % shape.block_size
            for j in range(total)
        ]
        keys, values = (
            part.flatten(0, 1)[slots].double().repeat_interleave(shape.group, dim=1)
            for part in (step.pool.keys, step.pool.values)
        )
        queries = step.queries[end - count : end].double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(shape.dim)
        at = torch.arange(total, device=scores.device)
        distance = packed.positions[end - count : end, None] - at[None]
        seen = (distance >= 0) & (distance < (shape.window or total))
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(pieces)
