"""Steps of the decoder as CPUs like them: weights laid out once for products in bfloat16, small steps in one pass.

torch lays a plain weight out anew for every product, which takes as long as a product of few rows itself, and a root
mean square norm is ten functions of its, a third of a step of one token.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import LayerPool
from engine.model import Decoder, LayerWeights
from engine.ops import Ops, PlainOps, padded

_ROWS = 16
"""The number of rows that the layout is chosen for; measured, others lose nothing by it."""
_PROJECTIONS = ("qkv", "output", "gate_up", "down")
log = logging.getLogger("hitpath.engine")


class LaidOutOps(PlainOps):
    """Products with weights that `lay_out` has made."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Ops`."""
        rows = len(x)
        missing = padded(rows) - rows
        if missing:  # as functional.pad does it, which fills all of it first
            narrow, x = x, x.new_empty(rows + missing, x.shape[1])
            x[:rows], x[rows:] = narrow, 0
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out[:rows]


def lay_out(model: Decoder) -> None:
    """Replace the projections of a model in bfloat16 on a CPU, layer by layer; the plain ones are freed.

    Leaves the model as it is where this torch cannot do so, or not correctly: then products are slower, nothing else.
    """
    weights = model.weights
    if weights.embedding.device.type != "cpu" or weights.embedding.dtype != torch.bfloat16 or not _works():
        return
    layers = tuple(_laid_out_layer(layer) for layer in weights.layers)
    model.weights = replace(weights, layers=layers, head=_laid_out(weights.head))
    model.ops = LaidOutOps()


def _laid_out_layer(layer: LayerWeights) -> LayerWeights:
    return replace(layer, **{name: _laid_out(getattr(layer, name)) for name in _PROJECTIONS})


def _laid_out(weight: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return laid_out


def _works() -> bool:
    """Whether the operators, which torch keeps for its own compiler, are here and agree with the plain product."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (3, 80))
    try:
        found = LaidOutOps().linear(x, _laid_out(weight), None)
    except (AttributeError, RuntimeError) as error:
        log.info("weights are not laid out for this CPU: %s", error)
        return False
    return torch.allclose(found, functional.linear(x, weight), rtol=0.02, atol=0.1)


class LoopedOps(PlainOps):
    """The small steps as loops compiled from `ops.c`, computed in float32 and rounded once; products as `products` has
    them. For bfloat16 and float32 on a CPU.
    """

    def __init__(self, products: Ops) -> None:
        """Raises ImportError where the loops were not compiled."""
        self._loops: Any = importlib.import_module("engine._ops")
        self.linear = products.linear  # type: ignore[method-assign]

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops`."""
        x, delta = x.contiguous(), None if delta is None else delta.contiguous()
        summed, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
        added = 0 if delta is None else delta.data_ptr()
        addresses = (x.data_ptr(), added, weight.data_ptr(), summed.data_ptr(), normed.data_ptr())
        self._loops.add_norm(*addresses, *x.shape, x.itemsize, eps)
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
        mixed = mixed.contiguous()
        rows, total, dim = mixed.shape
        kv_heads = memory.keys.shape[2]
        heads = total - 2 * kv_heads
        cosines, sines = (part.to(mixed.dtype).contiguous() for part in turn)
        weights = (0, 0) if norms is None else tuple(norm.data_ptr() for norm in norms)
        pool = (memory.keys.data_ptr(), memory.values.data_ptr(), slots.data_ptr())
        self._loops.turn_write(
            mixed.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            *weights,
            *pool,
            rows,
            heads,
            kv_heads,
            dim,
            mixed.itemsize,
            eps,
        )
        return mixed[:, :heads], mixed[:, heads : heads + kv_heads], mixed[:, heads + kv_heads :]

    def gate(self, both: Tensor) -> Tensor:
        """See `Ops`."""
        both = both.contiguous()
        out = both.new_empty(len(both), both.shape[1] // 2)
        self._loops.gate(both.data_ptr(), out.data_ptr(), *out.shape, out.itemsize)
        return out
