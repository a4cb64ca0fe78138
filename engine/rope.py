"""Rotary position embeddings with the scalings that published checkpoints use.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1's frequency rule.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from engine.config import RopeConfig

_TABLE = 32768
"""Positions whose cosines and sines are kept: 16 MB for heads of 128."""


class Rope:
    """Angles for positions; one per model."""

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int, *, device: torch.device) -> None:
        self._config, self._dim, self._max_positions = config, head_dim, max_positions
        self._scale = _attention_factor(config)
        self._frequencies = _frequencies(config, head_dim).to(device)
        self._table: tuple[Tensor, Tensor] | None = None
        """Of `_circle`, for the first positions."""

    @property
    def stretches(self) -> bool:
        """Whether angles depend on how long the text is, so that keys of one length do not serve another."""
        return self._config.kind == "dynamic"

    def __call__(self, positions: Tensor, spans: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each float32 [N, 1, D], for positions int64 [N].

        The sines of the first half are negated, which is what `rotate` wants. `spans` int64 [N]: length of the text
        that each token is computed in, for `dynamic`; other kinds have no use for it.
        """
        angles = self._angles(positions, spans)
        return _paired(angles.cos() * self._scale, angles.sin() * self._scale)

    def difference(self, before: tuple[range, int | None], after: tuple[range, int | None]) -> tuple[Tensor, Tensor]:
        """What turns keys that were turned for `before`, positions and the text's length, into keys turned for `after`.

        As `__call__` returns it. Any scale of the angles is in the keys already. What is turned by is the difference of
        the rounded angles that both places really get, so that far positions lose nothing; its cosine and sine follow
        from theirs, since that difference itself has no room in float32.
        """
        old_cos, old_sin = self._circle(*before)
        new_cos, new_sin = self._circle(*after)
        return _paired(new_cos * old_cos + new_sin * old_sin, new_sin * old_cos - new_cos * old_sin)

    def _circle(self, run: range, span: int | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, D / 2] of the angles at these positions side by side."""
        if span is None and run.stop <= _TABLE:
            if self._table is None or len(self._table[0]) < run.stop:
                angles = self._angles(self._positions(range(1 << (run.stop - 1).bit_length())), None)
                self._table = angles.cos(), angles.sin()
            return self._table[0][run.start : run.stop], self._table[1][run.start : run.stop]
        positions = self._positions(run)
        angles = self._angles(positions, None if span is None else torch.full_like(positions, span))
        return angles.cos(), angles.sin()

    def _positions(self, run: range) -> Tensor:
        return torch.arange(run.start, run.stop, device=self._frequencies.device)

    def _angles(self, positions: Tensor, spans: Tensor | None) -> Tensor:
        """Radians, float32 [N, D / 2]."""
        return positions[:, None].float() * (self._frequencies if spans is None else self._stretched(spans))

    def _stretched(self, spans: Tensor) -> Tensor:
        """Frequencies [N, D / 2] with the base grown for texts longer than the model was trained on."""
        rope, dim = self._config, self._dim
        longest = spans.clamp(min=self._max_positions).double()
        stretch = rope.factor * longest / self._max_positions - (rope.factor - 1)
        base = rope.theta * stretch ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=spans.device).double() / dim
        return (1.0 / base[:, None] ** exponents).float()


def _paired(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D / 2] each to what `rotate` wants."""
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [N, heads, D] by what `Rope` returned; halves are the pairs, as in the HF layout."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)


def _frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """Radians per position, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    plain: Tensor = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / rope.factor
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
