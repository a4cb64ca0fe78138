"""The small steps between a decoder's matrix products, as torch has them; `engine.fused` has them in one kernel each.

Shapes: N new tokens, H query heads, K key/value heads, D head size, E hidden size, F inner size of the MLP.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import LayerPool
from engine.rope import rotate


class Ops(Protocol):
    """Matrix products, and what lies between two of them."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, E] times weight [F, E] transposed, plus bias [F]: [N, F]."""
        ...

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + delta, and its root mean square norm times weight [E]; both [N, E]."""
        ...

    def turn_write(
        self,
        mixed: Tensor,
        turn: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        memory: LayerPool,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, D], keys and values [N, K, D] of mixed [N, H + 2K, D], the latter two written to the pool.

        `turn`: cosines and sines of `Rope`, each [N, 1, D]. `norms`: weights [D] for queries and for keys, which are
        normalised before they are turned. `mixed` may be overwritten.
        """
        ...

    def gate(self, both: Tensor) -> Tensor:
        """silu of the first half times the second: [N, 2F] to [N, F]."""
        ...


class PlainOps:
    """With torch's own functions, on any device."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Ops`."""
        return functional.linear(x, weight, bias)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        summed = x if delta is None else x + delta
        return summed, functional.rms_norm(summed, weight.shape, weight, eps)

    def turn_write(
        self,
        mixed: Tensor,
        turn: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        memory: LayerPool,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Ops`."""
        kv_heads = memory.keys.shape[2]
        heads = mixed.shape[1] - 2 * kv_heads
        turning, values = mixed[:, : heads + kv_heads], mixed[:, heads + kv_heads :]
        if norms is not None:
            parts = (turning[:, :heads], turning[:, heads:])
            normed = [functional.rms_norm(x, w.shape, w, eps) for x, w in zip(parts, norms, strict=True)]
            turning = torch.cat(normed, dim=1)
        turned = rotate(turning, *turn)
        queries, keys = turned[:, :heads], turned[:, heads:]
        memory.write(slots, keys, values)
        return queries, keys, values

    def gate(self, both: Tensor) -> Tensor:
        """See `Ops`."""
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


def padded(rows: int) -> int:
    """The number of rows that `rows` are computed as, an eighth more at most.

    The CPU's kernels for bfloat16 write and keep a program for every number of rows they meet, in ten times the time of
    the product itself and for up to a quarter of a megabyte; steps of continuous batching would meet them all.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step
