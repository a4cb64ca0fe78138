"""One sequence through the model by hand, without scheduler or blocks' books."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention import KvPool, Packed
from engine.attention.sdpa import SdpaBackend
from engine.checkpoint import Checkpoint

BLOCK = 4


class Stepper:
    """Tokens in, logits out; what came before is in the pool."""

    def __init__(self, checkpoint: Checkpoint, capacity: int) -> None:
        config = checkpoint.config
        self._checkpoint, self._length = checkpoint, 0
        blocks = -(-capacity // BLOCK)
        self._table = torch.randperm(blocks, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
        self._pool = KvPool(
            layers=config.layers,
            blocks=blocks,
            block_size=BLOCK,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=checkpoint.dtype,
            device=checkpoint.device,
        )

    def __call__(self, ids: list[int], *, span: int | None = None) -> Tensor:
        """Logits [T, V] of T further tokens; `span`: length of the text they are computed in, if longer than so far."""
        model, start = self._checkpoint.model, self._length
        total = self._length = start + len(ids)
        positions = torch.arange(start, total)
        packed = Packed(
            ids=torch.tensor(ids),
            positions=positions,
            slots=self._table[positions // BLOCK].long() * BLOCK + positions % BLOCK,
            tables=self._table[None, : -(-total // BLOCK)],
            starts=torch.tensor([0, len(ids)], dtype=torch.int32),
            lengths=torch.tensor([total], dtype=torch.int32),
            counts=(len(ids),),
            totals=(total,),
            drawing=torch.arange(len(ids)),
            spans=(positions + 1).clamp(min=span or 0) if model.rope.stretches else None,
        )
        return model.logits(model.forward(packed, self._pool, SdpaBackend()))
