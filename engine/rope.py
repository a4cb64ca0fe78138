"""Rotary position embeddings with the scalings that published checkpoints use.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1's frequency rule.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from engine.config import RopeConfig


class Rope:
    """Angles for positions. One per model; the scaled frequencies are computed once, `dynamic` ones as length grows."""

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int) -> None:
        self._config = config
        self._dim = head_dim
        self._max_positions = max_positions
        self._scale = _attention_factor(config)
        self._frequencies = _frequencies(config, head_dim, max_positions, max_positions)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each float32 [..., T, head_dim], for positions int64 [..., T]."""
        frequencies = self._frequencies
        if self._config.kind == "dynamic":
            longest = max(int(positions.max()) + 1, self._max_positions)
            frequencies = _frequencies(self._config, self._dim, self._max_positions, longest)
        angles = positions[..., None].float() * frequencies.to(positions.device)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * self._scale, both.sin() * self._scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, T, head_dim] by angles [B, T, head_dim]; halves are the pairs, as in the HF layout."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def _frequencies(rope: RopeConfig, dim: int, max_positions: int, length: int) -> Tensor:
    """Radians per position, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    plain: Tensor = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "dynamic":
            stretch = rope.factor * length / max_positions - (rope.factor - 1)
            stretched: Tensor = 1.0 / ((rope.theta * stretch ** (dim / (dim - 2))) ** exponents)
            return stretched
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, dim, plain)
        case _ as never:
            assert_never(never)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    turns = rope.original_max_positions * plain / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * plain / rope.factor + smooth * plain


def _yarn(rope: RopeConfig, dim: int, plain: Tensor) -> Tensor:
    """Interpolate the slow dimensions, keep the fast ones, with a linear ramp between (section 3.2)."""

    def dimension(turns: float) -> float:
        waves = math.log(rope.original_max_positions / (turns * 2 * math.pi))
        return dim * waves / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001) if high == low else high - low
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature, folded into cos and sin; 1 for every other kind."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
