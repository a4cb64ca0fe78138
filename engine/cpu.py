"""Matrix products in bfloat16 on CPUs, with the weights laid out once the way oneDNN's kernels read them.

torch lays a plain weight out anew for every product, which takes as long as a product of few rows itself.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from engine.model import Decoder, LayerWeights
from engine.ops import PlainOps, padded

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
        if missing:
            x = functional.pad(x, (0, 0, 0, missing))
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
