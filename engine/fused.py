"""The small steps between a decoder's matrix products, one Triton kernel each.

A decoding step reads every weight once and is otherwise all small tensors: in torch's own functions these steps are
a dozen kernels a layer, each of which lasts longer than its work.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from engine import kernels
from engine.attention import LayerPool
from engine.ops import PlainOps

_HEADS = 8
"""Heads that one program turns."""
_STRETCH = 1024
"""Elements that one program gates."""


class FusedOps(PlainOps):
    """As its base, but the steps between products are one kernel each, computed in float32 and rounded once."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        x = x.contiguous()
        normed = torch.empty_like(x)
        summed = x if delta is None else torch.empty_like(x)
        size = x.shape[1]
        block = triton.next_power_of_2(size)
        kernels.add_norm[(len(x),)](
            x,
            x if delta is None else delta.contiguous(),
            weight,
            summed,
            normed,
            eps,
            SIZE=size,
            ADD=delta is not None,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
        return summed, normed

    def turn_write(
        self,
        mixed: Tensor,
        turn: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        memory: LayerPool,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops`. Queries and keys are views of `mixed`, turned in place."""
        count, total, dim = mixed.shape
        kv_heads = memory.keys.shape[2]
        heads = total - 2 * kv_heads
        assert mixed.is_contiguous()
        assert memory.keys.is_contiguous()
        assert memory.values.is_contiguous()
        cos, sin = turn
        query_norm, key_norm = norms or (mixed, mixed)
        kernels.turn_write[(count, -(-total // _HEADS))](
            mixed,
            cos,
            sin,
            slots,
            memory.keys,
            memory.values,
            query_norm,
            key_norm,
            eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            NORM=norms is not None,
            BLOCK_H=_HEADS,
            HALF=triton.next_power_of_2(dim // 2),
            num_warps=2,
        )
        return mixed[:, :heads], mixed[:, heads : heads + kv_heads], mixed[:, heads + kv_heads :]

    def gate(self, both: Tensor) -> Tensor:
        """See `Ops`."""
        size = both.shape[1] // 2
        out = torch.empty((len(both), size), dtype=both.dtype, device=both.device)
        block = min(_STRETCH, triton.next_power_of_2(size))
        kernels.gate[(len(both), -(-size // block))](both.contiguous(), out, SIZE=size, BLOCK=block, num_warps=4)
        return out
