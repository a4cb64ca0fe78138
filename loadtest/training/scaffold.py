"""Shows a few heads early in training where to look, so that copying from the context appears, and appears soon.

Two kinds of heads make a decoder repeat what stood before (Olsson et al., arXiv 2209.11895): one looks at the token
before; one of a later layer looks for a place where the present tokens stood already, and at what followed there. Left
to chance they take more text to appear than two cores read in half an hour, and with some seeds they never do. Where
they should look is known from the tokens alone, so their attention is part of the loss: much of it at first, a little
of it to the end.

Where there is nothing to repeat they rest on the first token, as heads of large models do (Xiao et al., arXiv
2309.17453): what reusing chunks spoils, and repairing them mends, has much to do with such resting places.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from loadtest.training.autocast import autocast

Goal = Literal["before", "followed"]
HEADS: tuple[tuple[int, int, Goal], ...] = ((1, 0, "before"), (3, 0, "followed"), (3, 2, "followed"))
"""Layer, head, and what it is to look at: the token before, or the one that followed when the last two tokens stood
together before, and the very first one where they never did. One of the second kind for each key head of the layer.
With these layers a token from 300 tokens ago is repeated far better than with the first two."""


class Scaffold:
    """Listens to a Llama of transformers while it computes."""

    def __init__(self, model: nn.Module) -> None:
        self._attention: dict[int, Any] = {}
        self._inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        layers: Any = model.get_submodule("model.layers")
        for layer in {layer for layer, _, _ in HEADS}:
            self._attention[layer] = layers[layer].self_attn
            layers[layer].self_attn.register_forward_pre_hook(self._heard(layer), with_kwargs=True)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the heads' attention over `ids`, int64 [B, N], which the model has just computed."""
        goals = {"before": torch.arange(ids.shape[1]).expand_as(ids) - 1, "followed": torch.from_numpy(followed(ids))}
        losses = [self._missed(layer, head, goals[goal]) for layer, head, goal in HEADS]
        return torch.stack(losses).mean()

    def _heard(self, layer: int) -> Any:
        def hear(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._inputs[layer] = (
                (named["hidden_states"] if "hidden_states" in named else args[0]),
                named["position_embeddings"],
            )

        return hear

    def _missed(self, layer: int, head: int, goals: Tensor) -> Tensor:
        """What the head's attention costs, mean over tokens that have a goal."""
        known = goals >= 0
        scores = self._scores(layer, head).log_softmax(-1)
        found = scores.gather(-1, goals.clamp(min=0)[..., None])[..., 0]
        return -(found * known).sum() / known.sum().clamp(min=1)

    def _scores(self, layer: int, head: int) -> Tensor:
        """float32 [B, N, N], the future left out."""
        attention, (hidden, (cos, sin)) = self._attention[layer], self._inputs[layer]
        size, group = attention.head_dim, attention.num_key_value_groups
        with autocast():
            queries, keys = (
                _turned(functional.linear(hidden, part.weight[which * size : (which + 1) * size]), cos, sin)
                for part, which in ((attention.q_proj, head), (attention.k_proj, head // group))
            )
            scores = (queries @ keys.transpose(-1, -2)).float() / size**0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        masked: Tensor = scores.masked_fill(future, -1e9)
        return masked


def followed(ids: Tensor) -> NDArray[np.int64]:
    """[B, N]: place of the token that followed when this one and the one before stood together last; 0: never."""
    return np.array([_followed(row) for row in ids.tolist()], dtype=np.int64)


def _followed(row: Sequence[int]) -> list[int]:
    last: dict[tuple[int, int], int] = {}
    places = [0]
    for place, pair in enumerate(pairwise(row), 1):
        places.append(last.get(pair, 0))
        last[pair] = place + 1
    return places


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, D] turned to their positions, as transformers has it: halves, not pairs."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin
