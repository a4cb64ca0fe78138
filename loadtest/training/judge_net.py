"""The pair model while it learns: MiniLM over both questions at once, in torch.

Three things differ from a plain cross-encoder:

* The word embeddings stay as the embedder has them. They are half of all weights, the package of the embedder brings
  them, and small sets would overfit them.
* Every token is marked with whether the other question has it too, and whether with the same neighbours. That is where
  the two differ, which a model this small otherwise spends layers on finding.
* The head sees both questions' means beside the first token, as the embedder compares means.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from gateway.judge.pairs import MARKS, PAIR_TOKENS

DIM = 384
LAYERS = 6
HEADS = 12
HIDDEN = 1536
UNITS = 128
DROPOUT = 0.1


class Layer(nn.Module):
    """One post-norm encoder layer of BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM, eps=1e-12)
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)
        self.last = nn.LayerNorm(DIM, eps=1e-12)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        """`rows` [pairs, tokens, DIM], `mask` [pairs, 1, 1, tokens], added to the attention: 0 or -inf."""
        pairs, tokens, _ = rows.shape
        query, key, value = self.qkv(rows).view(pairs, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        # Written out: on short rows the fused kernel's backward pass takes longer than all the rest.
        share = (query @ key.transpose(2, 3) * (DIM // HEADS) ** -0.5 + mask).softmax(-1)
        seen = share.to(value.dtype) @ value
        rows = self.norm(rows + self.drop(self.out(seen.transpose(1, 2).reshape(pairs, tokens, DIM))))
        return self.last(rows + self.drop(self.down(functional.gelu(self.up(rows)))))  # type: ignore[no-any-return]


class PairNet(nn.Module):
    """Logit that one answer serves both questions of a pair."""

    def __init__(self, words: Tensor) -> None:
        """`words` [vocabulary, DIM]: frozen, and no part of the state."""
        super().__init__()
        self.words: Tensor
        self.register_buffer("words", words, persistent=False)
        self.places = nn.Embedding(PAIR_TOKENS, DIM)
        self.marks = nn.Embedding(MARKS, DIM)
        self.norm = nn.LayerNorm(DIM, eps=1e-12)
        self.drop = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.units = nn.Linear(3 * DIM, UNITS)
        self.answer = nn.Linear(UNITS, 1)

    @classmethod
    def start(cls, weights: Mapping[str, Tensor]) -> PairNet:
        """Begin with the embedder's weights."""
        net = cls(weights["embeddings.word_embeddings.weight"].clone())
        types = weights["embeddings.token_type_embeddings.weight"]
        with torch.no_grad():
            net.places.weight.copy_(weights["embeddings.position_embeddings.weight"][:PAIR_TOKENS])
            # Half of the marks speak of the first question, half of the second.
            net.marks.weight.copy_(types.repeat_interleave(MARKS // 2, 0))
            net.marks.weight.add_(torch.randn_like(net.marks.weight) * 0.02)
        _copy(net.norm, weights, "embeddings.LayerNorm")
        for number, layer in enumerate(net.layers):
            assert isinstance(layer, Layer)
            _load_layer(layer, weights, f"encoder.layer.{number}")
        return net

    def forward(self, ids: Tensor, marks: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        """Logits [pairs]; all inputs [pairs, tokens], `second` and `mask` are bool."""
        places = self.places.weight[: ids.shape[1]]
        rows = self.norm(self.words[ids] + places + self.marks(marks))
        seen = torch.zeros(mask.shape).masked_fill(~mask, -1e4)[:, None, None]
        for layer in self.layers:
            rows = layer(rows, seen)
        first = _mean(rows, mask & ~second)
        other = _mean(rows, mask & second)
        pooled = torch.cat([rows[:, 0], (first - other).abs(), first * other], 1)
        return self.answer(self.drop(functional.gelu(self.units(pooled))))[:, 0].float()  # type: ignore[no-any-return]


def _load_layer(layer: Layer, weights: Mapping[str, Tensor], prefix: str) -> None:
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [weights[f"{prefix}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            getattr(layer.qkv, kind).copy_(torch.cat(parts))
    _copy(layer.out, weights, f"{prefix}.attention.output.dense")
    _copy(layer.norm, weights, f"{prefix}.attention.output.LayerNorm")
    _copy(layer.up, weights, f"{prefix}.intermediate.dense")
    _copy(layer.down, weights, f"{prefix}.output.dense")
    _copy(layer.last, weights, f"{prefix}.output.LayerNorm")


def _copy(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    with torch.no_grad():
        for kind in ("weight", "bias"):
            getattr(module, kind).copy_(weights[f"{name}.{kind}"])


def _mean(rows: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(rows.dtype)[:, :, None]
    return (rows * weight).sum(1) / weight.sum(1).clamp(min=1)
