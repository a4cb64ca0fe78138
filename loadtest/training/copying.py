"""Weights to start from that copy already: the circuit that repeats what stood before, laid out by hand.

Two layers make it (Olsson et al., arXiv 2209.11895): a head of the first looks at the token before and writes down
which one it was; heads of the second look for a place where the token written down is the present one, and repeat what
stands there. Left to chance it takes more text to appear than two cores read in half an hour, and with some seeds
it never does. Started near it, training keeps it and sharpens it; no weight stays as it was laid out.

Two dimensions of the embeddings are set apart: one is the same for all tokens, so that a head can look at a distance
whatever stands there; one says how common a token is, so that training has nothing to learn in its first steps that
would sweep the rest away.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_STREAM = 10.0
"""Scale of what layers add up, undone by the last norm: a step of Adam is small against what was laid out in it."""
_EMBEDDING, _INNER = 0.05, 0.06
_CONSTANT, _COMMON = 0.15, 0.08
_SHARP = 5.0
"""How strongly the first head prefers the token before."""
_FAST = 8
"""Rotary pairs that tell neighbours apart."""
_WRITTEN = 0.05
_MATCH = 2.5
_MATCHED = 32
"""Dimensions compared, in the slowest rotary pairs: those hardly turn over some hundred tokens."""
_REPEATED = 0.5
_PRIOR = 6.0
"""Weight of how common a token is, with nothing else to go by."""
_DIM = 64


def lay_out(model: nn.Module, stream: NDArray[np.int64], *, theta: float, seed: int) -> None:
    """Fill a Llama of transformers with 4 query and 2 key/value heads of 64; what is not laid out is random or zero.

    `stream`: the tokens of the text to be trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif weight.dim() > 1:
                std = _EMBEDDING * _STREAM if "embed" in name else _INNER
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        embedding = weights["model.embed_tokens.weight"]
        counts = torch.from_numpy(np.bincount(stream, minlength=len(embedding)) + 1.0).log().float()
        embedding[:, 0] = _CONSTANT * _STREAM
        embedding[:, 1] = _COMMON * _STREAM * (counts - counts.mean())
        weights["model.norm.weight"].fill_(1 / _STREAM)
        _lay_out(weights, theta, generator)


def faster(name: str) -> float:
    """By how much the rate of a weight is higher for what adds to the stream at its larger scale."""
    laid_out = ("layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj")
    adds = "embed_tokens" in name or name.endswith(("o_proj.weight", "down_proj.weight"))
    return 6.0 if adds and not any(part in name for part in laid_out) else 1.0


def _lay_out(weights: Mapping[str, Tensor], theta: float, generator: torch.Generator) -> None:
    def part(layer: int, name: str) -> Tensor:
        return weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]

    width, half = part(0, "q").shape[1], _DIM // 2
    read, write = (_directions(_DIM, width, generator) for _ in range(2))
    # The first query head and the first key head see only the constant; the angle between them is that of one step.
    angles = theta ** -(torch.arange(_FAST) / half)
    part(0, "q")[:_DIM] = part(0, "k")[:_DIM] = 0
    part(0, "q")[:_FAST, 0] = _SHARP
    part(0, "k")[:_FAST, 0] = _SHARP * angles.cos()
    part(0, "k")[half : half + _FAST, 0] = _SHARP * angles.sin()
    part(0, "v")[:_DIM] = read
    part(0, "o")[:, :_DIM] = _WRITTEN * _STREAM * write.T
    # One query head of each group compares; values and output pass on what stands there, a part by each group.
    slow = torch.cat([torch.arange(half - _MATCHED // 2, half), torch.arange(_DIM - _MATCHED // 2, _DIM)])
    passed = _directions(2 * _DIM, width, generator)
    for group in range(2):
        query = slice(2 * group * _DIM, (2 * group + 1) * _DIM)
        key = slice(group * _DIM, (group + 1) * _DIM)
        part(1, "q")[query] = part(1, "k")[key] = 0
        part(1, "q")[query][slow] = _MATCH * read[:_MATCHED]
        part(1, "k")[key][slow] = _MATCH * write[:_MATCHED]
        part(1, "v")[key] = passed[key]
        part(1, "o")[:, query] = _REPEATED * _STREAM * passed[key].T
    # The mean of a constant is a constant, wherever the last layer looks.
    part(5, "v")[:_DIM] = 0
    part(5, "v")[0, 0] = 1
    part(5, "o")[1, 0] = _PRIOR * _STREAM


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows [count, width], blind to the two dimensions set apart."""
    rows: Tensor = torch.linalg.qr(torch.randn(width, count, generator=generator))[0].T.clone()
    rows[:, :2] = 0
    return rows
