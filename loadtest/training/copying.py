"""Weights to start from that copy already: the circuit that repeats what stood before, laid out by hand.

Two layers make it (Olsson et al., arXiv 2209.11895): a head of the first looks at the token before and writes down
which one it was; heads of the second look for a place where the token written down is the present one, and repeat what
stands there. Left to chance it takes more text to appear than a few minutes on two cores can read, and with some seeds
it never does. Started near it, training keeps and sharpens it; no weight stays as it was laid out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CONSTANT = 0.15
"""The first dimension of every embedding, so that a head can look at a distance, whatever token stands there."""
_EMBEDDING, _INNER = 0.05, 0.06
_SHARP = 5.0
"""How strongly the first head prefers the token before."""
_FAST = 8
"""Rotary pairs that tell neighbours apart."""
_WRITTEN = 0.05
_MATCH = 2.5
_MATCHED = 32
"""Dimensions compared, in the slowest rotary pairs: those hardly turn over some hundred tokens."""
_REPEATED = 0.5


def lay_out(model: nn.Module, *, theta: float, seed: int) -> None:
    """Fill a Llama of transformers with 2 key/value heads of 64 and 4 query heads; all but the circuit is random."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif weight.dim() > 1:
                std = _EMBEDDING if "embed" in name else _INNER
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        weights["model.embed_tokens.weight"][:, 0] = CONSTANT
        _lay_out(weights, theta, generator)


def _lay_out(weights: Mapping[str, Tensor], theta: float, generator: torch.Generator) -> None:
    def part(layer: int, name: str) -> Tensor:
        return weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]

    width, dim = part(0, "q").shape[1], 64
    half = dim // 2
    read, write = (_directions(dim, width, generator) for _ in range(2))
    # The first query head and the first key head see only the constant; their angle is that of one step.
    angles = theta ** -(torch.arange(_FAST) / half)
    part(0, "q")[:dim] = part(0, "k")[:dim] = 0
    part(0, "q")[:_FAST, 0] = _SHARP
    part(0, "k")[:_FAST, 0] = _SHARP * angles.cos()
    part(0, "k")[half : half + _FAST, 0] = _SHARP * angles.sin()
    part(0, "v")[:dim] = read
    part(0, "o")[:, :dim] = _WRITTEN * write.T
    # One query head of each group compares; values and output pass on what stands there, a part by each group.
    slow = torch.cat([torch.arange(half - _MATCHED // 2, half), torch.arange(dim - _MATCHED // 2, dim)])
    passed = _directions(2 * dim, width, generator)
    for group in range(2):
        query, key = slice(2 * group * dim, (2 * group + 1) * dim), slice(group * dim, (group + 1) * dim)
        part(1, "q")[query] = part(1, "k")[key] = 0
        part(1, "q")[query][slow] = _MATCH * read[:_MATCHED]
        part(1, "k")[key][slow] = _MATCH * write[:_MATCHED]
        part(1, "v")[key] = passed[key]
        part(1, "o")[:, query] = _REPEATED * passed[key].T


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows [count, width], blind to the constant."""
    rows: Tensor = torch.linalg.qr(torch.randn(width, count, generator=generator))[0].T.clone()
    rows[:, 0] = 0
    return rows
