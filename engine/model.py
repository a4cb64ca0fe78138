"""A decoder of the Llama kind: Llama, Qwen2, Qwen3 and Mistral in one file.

Shapes: N new tokens of all sequences of a step, packed without padding; H heads, K key/value heads, D head size,
E hidden size, F inner size of the MLP, V vocabulary. Weights are plain tensors: there is nothing to train here, and
calling modules would cost a tenth of a small model's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import AttentionBackend, KvPool, LayerPool, Packed
from engine.config import ModelConfig
from engine.ops import Ops, PlainOps
from engine.rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer. Projections that read the same input lie in one matrix, so that they are one product."""

    input_norm: Tensor
    """[E]."""
    qkv: Tensor
    """[(H + 2K)·D, E]: queries, keys, values."""
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    """[D], as is `key_norm`: Qwen3 normalises heads before turning them."""
    key_norm: Tensor | None
    output: Tensor
    """[E, H·D]."""
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    """[2F, E]."""
    gate_up_bias: Tensor | None
    down: Tensor
    """[E, F]."""
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Everything that was learnt."""

    embedding: Tensor
    """[V, E]."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    """[V, E]; the embedding itself where they are tied."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the Hugging Face layout, and the rows of ours that it fills."""

    shape: tuple[int, ...]
    start: int = 0


def layer_layout(config: ModelConfig) -> dict[str, dict[str, Part]]:
    """Per field of LayerWeights the stored tensors it is made of, in order; names follow `model.layers.N.`."""
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.heads * d, config.kv_heads * d
    projections = {"q_proj": (0, q), "k_proj": (q, kv), "v_proj": (q + kv, kv)}
    halves = {"gate_proj": (0, f), "up_proj": (f, f)}
    layout = {
        "input_norm": {"input_layernorm.weight": Part((e,))},
        "qkv": {f"self_attn.{name}.weight": Part((rows, e), start) for name, (start, rows) in projections.items()},
        "output": {"self_attn.o_proj.weight": Part((e, q))},
        "mlp_norm": {"post_attention_layernorm.weight": Part((e,))},
        "gate_up": {f"mlp.{name}.weight": Part((rows, e), start) for name, (start, rows) in halves.items()},
        "down": {"mlp.down_proj.weight": Part((e, f))},
    }
    if config.qkv_bias:
        layout["qkv_bias"] = {
            f"self_attn.{name}.bias": Part((rows,), start) for name, (start, rows) in projections.items()
        }
    if config.output_bias:
        layout["output_bias"] = {"self_attn.o_proj.bias": Part((e,))}
    if config.qk_norm:
        layout["query_norm"] = {"self_attn.q_norm.weight": Part((d,))}
        layout["key_norm"] = {"self_attn.k_norm.weight": Part((d,))}
    if config.mlp_bias:
        layout["gate_up_bias"] = {f"mlp.{name}.bias": Part((rows,), start) for name, (start, rows) in halves.items()}
        layout["down_bias"] = {"mlp.down_proj.bias": Part((e,))}
    return layout


def stored_tensors(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    """Every tensor that a checkpoint must have, named as stored but without the leading `model.`."""
    yield "embed_tokens.weight", Part((config.vocab_size, config.hidden_size))
    yield "norm.weight", Part((config.hidden_size,))
    if not config.tied:
        yield "lm_head.weight", Part((config.vocab_size, config.hidden_size))
    layout = layer_layout(config)
    for index in range(config.layers):
        for parts in layout.values():
            for name, part in parts.items():
                yield f"layers.{index}.{name}", part


def empty_weights(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> tuple[Weights, dict[str, Tensor]]:
    """Uninitialised weights, and for every stored tensor the view of them that it is to be copied into."""
    views: dict[str, Tensor] = {}

    def tensor(parts: dict[str, Part], prefix: str = "") -> Tensor:
        rows = sum(part.shape[0] for part in parts.values())
        whole = torch.empty((rows, *next(iter(parts.values())).shape[1:]), dtype=dtype, device=device)
        for name, part in parts.items():
            views[prefix + name] = whole[part.start : part.start + part.shape[0]]
        return whole

    layout = layer_layout(config)
    optional = dict.fromkeys(LayerWeights.__slots__)
    layers = tuple(
        LayerWeights(**{**optional, **{field: tensor(parts, f"layers.{i}.") for field, parts in layout.items()}})  # type: ignore[arg-type]
        for i in range(config.layers)
    )
    outer = {name: tensor({name: part}) for name, part in stored_tensors(config) if not name.startswith("layers.")}
    embedding = outer["embed_tokens.weight"]
    return Weights(embedding, layers, outer["norm.weight"], outer.get("lm_head.weight", embedding)), views


class Decoder:
    """Token ids in, hidden states out; `logits` turns those into scores."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.rope = Rope(config.rope, config.head_dim, config.max_positions, device=weights.embedding.device)
        self._heads = (config.heads, config.kv_heads)
        self.ops: Ops = PlainOps()
        """The small steps between matrix products; whoever starts on a GPU may put the fused twin here."""

    def forward(self, packed: Packed, pool: KvPool, backend: AttentionBackend) -> Tensor:
        """Hidden states [R, E] of the rows `packed.drawing`; keys and values of all N tokens go to the pool."""
        plans = {w: backend.plan(packed, w, pool.block_size) for w in dict.fromkeys(self.config.windows)}
        dtype = self.weights.embedding.dtype
        cos, sin = (angle.to(dtype) for angle in self.rope(packed.positions, packed.spans))
        eps, rows = self.config.norm_eps, packed.drawing
        x, delta = functional.embedding(packed.ids, self.weights.embedding), None
        for layer, window, memory in zip(self.weights.layers, self.config.windows, pool.layers, strict=True):
            x, normed = self.ops.add_norm(x, delta, layer.input_norm, eps)
            delta = self._attention(layer, normed, (cos, sin), packed, memory, backend, plans[window])
            x, normed = self.ops.add_norm(x, delta, layer.mlp_norm, eps)
            delta = self._mlp(layer, normed)
        last = None if delta is None else delta[rows]
        return self.ops.add_norm(x[rows], last, self.weights.norm, eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [R, V] of hidden states [R, E]."""
        return self.ops.linear(hidden, self.weights.head, None)

    def _attention(
        self,
        layer: LayerWeights,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        packed: Packed,
        memory: LayerPool,
        backend: AttentionBackend,
        plan: object,
    ) -> Tensor:
        heads, kv_heads = self._heads
        mixed = self.ops.linear(x, layer.qkv, layer.qkv_bias).view(len(x), heads + 2 * kv_heads, -1)
        norms = None
        if layer.query_norm is not None and layer.key_norm is not None:
            norms = (layer.query_norm, layer.key_norm)
        queries, keys, values = self.ops.turn_write(mixed, turn, norms, self.config.norm_eps, memory, packed.slots)
        seen = backend.attend(queries, memory, plan, (keys, values))
        return self.ops.linear(seen.view(len(x), -1), layer.output, layer.output_bias)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        both = self.ops.linear(x, layer.gate_up, layer.gate_up_bias)
        return self.ops.linear(self.ops.gate(both), layer.down, layer.down_bias)
