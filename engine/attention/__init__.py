"""Attention over paged keys and values: one signature, several backends, compared with a plain twin.

Shapes: N packed new tokens of B sequences, H query heads, K key/value heads, D head size, P blocks of S tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The new tokens of one step, sequence after sequence without padding, and where all their keys lie.

    Sequence b owns rows `starts[b]:starts[b + 1]`; they are its tokens `lengths[b] - count : lengths[b]`, in order.
    Where `firsts` is given they may be any of its tokens, in order, the last one of all among them: what lies between
    is in the pool already.
    The host lists say the same as the tensors, so that planning never waits for the device.
    """

    ids: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [N]; token j of a sequence is at position j."""
    slots: Tensor
    """int64 [N]: block · S + offset where keys and values of each new token are written."""
    tables: Tensor
    """int32 [B, M]: block of tokens i·S to (i+1)·S; behind the last one a row is filled with any valid block."""
    starts: Tensor
    """int32 [B + 1]."""
    lengths: Tensor
    """int32 [B]: tokens of each sequence to attend to, new ones included."""
    counts: tuple[int, ...]
    """New tokens of each sequence."""
    totals: tuple[int, ...]
    """`lengths` on the host."""
    drawing: Tensor
    """int64 [R]: rows whose scores are wanted."""
    spans: Tensor | None = None
    """int64 [N]: length of the text each token is computed in; only where rotary angles depend on it."""
    firsts: tuple[int, ...] | None = None
    """Position of each sequence's first new token, where new tokens are not the last ones without a gap."""

    def narrowed(self, rows: Tensor, counts: tuple[int, ...], firsts: tuple[int, ...]) -> Packed:
        """The same step with only these of its rows, int64 [M], in order, of which `counts` belong to each sequence.

        Every row whose scores are wanted must stay. `firsts` as above.
        """
        place = torch.full_like(self.ids, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        ends = torch.tensor((0, *accumulate(counts)), dtype=torch.int32, device=rows.device)
        return replace(
            self,
            ids=self.ids[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            starts=ends,
            counts=counts,
            drawing=place[self.drawing],
            spans=None if self.spans is None else self.spans[rows],
            firsts=firsts,
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerPool:
    """Keys and values of one layer."""

    keys: Tensor
    """[P, S, K, D]."""
    values: Tensor
    """[P, S, K, D]."""

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [N, K, D] each, of the tokens at slots int64 [N]."""
        keys, values = (part.view(-1, *part.shape[2:]) for part in (self.keys, self.values))
        return keys.index_select(0, slots), values.index_select(0, slots)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [N, K, D] of new tokens at slots int64 [N]."""
        self.keys.view(-1, *keys.shape[1:]).index_copy_(0, slots, keys)
        self.values.view(-1, *values.shape[1:]).index_copy_(0, slots, values)


class AttentionBackend(Protocol):
    """How queries meet keys on one kind of device. Holds no keys; may hold scratch memory."""

    name: str

    def plan(self, packed: Packed, window: int | None, block_size: int) -> Any:
        """Prepare one step for layers with this sliding window; its result is used for all of them."""
        ...

    def attend(self, queries: Tensor, pool: LayerPool, plan: Any, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """[N, H, D] to [N, H, D], contiguous. A query sees keys at positions ≤ its own, nearer than the window.

        Keys and values of the new tokens are in the pool already; `fresh` has them packed as well, each [N, K, D].
        """
        ...


class KvPool:
    """All blocks of all layers, allocated once."""

    def __init__(
        self,
        *,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises torch.OutOfMemoryError or RuntimeError where the memory cannot be had."""
        shape = (2, blocks, block_size, kv_heads, head_dim)
        self.block_size = block_size
        # Zeroed: what lies behind the last token of a block is read and masked, and must not be NaN.
        buffers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.layers = [LayerPool(buffer[0], buffer[1]) for buffer in buffers]
        self._buffers = buffers

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in every layer; one after another, since a target may be a later source."""
        for source, target in pairs:
            for buffer in self._buffers:
                buffer[:, target] = buffer[:, source]
