"""A decoder of the Llama kind: Llama, Qwen2, Qwen3 and Mistral in one file.

Shapes: B sequences, T new tokens, S tokens attended to, H heads, K key/value heads, D head size, E hidden size,
V vocabulary. Parameter names are those of the Hugging Face layout without the leading `model.`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config import ModelConfig
from engine.rope import Rope, rotate


class Cache(Protocol):
    """Where keys and values of earlier tokens lie. The seam behind which the paged cache will stand."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, D] of the new tokens of one layer; return all [B, K, S, D] that may be attended to."""
        ...

    def extend(self, positions: Tensor) -> Tensor:
        """Announce the positions [B, T] of the new tokens, once per forward; return those of all S tokens, [B, S]."""
        ...


class ContiguousCache:
    """Keys and values of one batch in one buffer per layer, grown by doubling up to the capacity."""

    def __init__(self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (config.kv_heads, config.head_dim)
        self._capacity = capacity
        self._options = {"dtype": dtype, "device": device}
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._layers = config.layers
        self._positions = torch.empty(0)
        self._start = 0

    def extend(self, positions: Tensor) -> Tensor:
        """Make room for the tokens at positions [B, T]."""
        self._start = self._positions.shape[-1]
        self._positions = torch.cat((self._positions, positions), dim=1) if self._start else positions
        self._reserve(positions.shape[0], self._positions.shape[1])
        return self._positions

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind what is there and return views of everything so far."""
        end = self._start + keys.shape[2]
        self._keys[layer][:, :, self._start : end] = keys
        self._values[layer][:, :, self._start : end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def _reserve(self, batch: int, length: int) -> None:
        held = self._keys[0].shape[2] if self._keys else 0
        if length <= held:
            return
        if length > self._capacity:
            raise ValueError(f"{length} tokens do not fit a cache of {self._capacity}")
        kv_heads, head_dim = self._shape
        size = min(self._capacity, max(length, 2 * held, 64))
        for layer in range(self._layers):
            for buffers in (self._keys, self._values):
                grown = torch.empty((batch, kv_heads, size, head_dim), **self._options)  # type: ignore[call-overload]
                if held:
                    grown[:, :, :held] = buffers[layer]
                    buffers[layer] = grown
                else:
                    buffers.append(grown)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype out as in."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self._layer, self._dim = layer, dim
        self._groups = config.heads // config.kv_heads
        self.q_proj = nn.Linear(size, config.heads * dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, config.kv_heads * dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, config.kv_heads * dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * dim, size, bias=config.output_bias)
        self.q_norm = RMSNorm(dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x [B, T, E] to [B, T, E]; mask bool [B, 1, T, S], or None where plain causal attention says the same."""
        batch, length, _ = x.shape
        queries = self.q_proj(x).view(batch, length, -1, self._dim)
        keys = self.k_proj(x).view(batch, length, -1, self._dim)
        values = self.v_proj(x).view(batch, length, -1, self._dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotate(queries.transpose(1, 2), *angles)
        keys = rotate(keys.transpose(1, 2), *angles)
        if cache is not None:
            keys, values = cache.update(self._layer, keys, values)
        mixed = attend(queries, keys, values, mask)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, [B, H, T, D] over [B, K, S, D] to [B, H, T, D].

    mask: bool [B, 1, T, S], True where a query may look; None means causal with T == S, or T == 1 over everything.
    """
    batch, heads, length, dim = queries.shape
    groups = heads // keys.shape[1]
    if length == 1 and mask is None:
        # One query per sequence: the group becomes the query axis, and the cache is read without repeating it.
        folded = queries.view(batch, keys.shape[1], groups, dim)
        return functional.scaled_dot_product_attention(folded, keys, values).view(batch, heads, 1, dim)
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] to [B, T, E]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[B, T, E] to [B, T, E]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Token ids in, hidden states out; `logits` turns those into scores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = Rope(config.rope, config.head_dim, config.max_positions)

    def forward(self, ids: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [B, T, E] of ids int64 [B, T] at positions int64 [B, T], which rise within a sequence.

        With a cache the tokens also see what it holds, and are added to it.
        """
        seen = positions if cache is None else cache.extend(positions)
        masks = {window: _mask(positions, seen, window) for window in set(self.config.windows)}
        x = self.embed_tokens(ids)
        angles = self.rope(positions)
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            x = layer(x, angles, masks[window], cache)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] of hidden states [..., E]."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return functional.linear(hidden, weight)


def _mask(positions: Tensor, seen: Tensor, window: int | None) -> Tensor | None:
    """Who sees whom, exactly: key position ≤ query position, and nearer than the window. [B, 1, T, S], or None.

    None where the kernel's own rule gives the same: all of a fresh causal prompt, or one token after all others.
    """
    length, total = positions.shape[1], seen.shape[1]
    if length in (1, total) and (window is None or total <= window):
        return None
    distance = positions[:, :, None] - seen[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    return allowed[:, None]
