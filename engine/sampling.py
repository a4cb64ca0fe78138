"""From scores to the next token."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is drawn. Values are checked where requests are read."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    """End tokens are not drawn before this many others."""
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report beside the chosen token's log probability; None reports nothing."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One drawn token, with what the model thought of it before temperature and penalties."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one answer; owns its generator, so a seed gives the same answer whatever else runs."""

    def __init__(self, params: SamplingParams, vocab_size: int, ends: Collection[int] = ()) -> None:
        """`ends`: the tokens that end an answer."""
        self._params, self._ends, self._drawn = params, list(ends), 0
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._counts = torch.zeros(vocab_size)
        self._penalised = bool(params.presence_penalty or params.frequency_penalty)

    def draw(self, scores: Tensor) -> Choice:
        """Choose from scores [V] of any dtype and device."""
        params, scores = self._params, scores.float().cpu()
        adjusted = self._adjust(scores)
        if params.temperature == 0.0:
            token = int(adjusted.argmax())
        else:
            probabilities = truncate(adjusted / params.temperature, params.top_k, params.top_p)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._counts[token] += 1
        self._drawn += 1
        return self._described(token, scores)

    def _adjust(self, scores: Tensor) -> Tensor:
        params = self._params
        if self._penalised:
            seen = (self._counts > 0).float()
            scores = scores - params.presence_penalty * seen - params.frequency_penalty * self._counts
        if params.logit_bias:
            scores = scores.clone()
            for token, bias in params.logit_bias.items():
                scores[token] += bias
        if self._ends and self._drawn < params.min_tokens:
            scores = scores.index_fill(0, torch.tensor(self._ends), float("-inf"))
        return scores

    def _described(self, token: int, scores: Tensor) -> Choice:
        if self._params.logprobs is None:
            return Choice(token)
        logprobs = torch.log_softmax(scores, dim=-1)
        values, ids = logprobs.topk(min(self._params.logprobs, len(scores)))
        return Choice(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def truncate(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] of scores [V] with all but the `top_k` likeliest, then all beyond mass `top_p`, set to zero.

    The token that crosses the mass is kept, so at least one always remains. Not normalised.
    """
    if 0 < top_k < len(scores):
        least = scores.topk(top_k).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    beyond = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), 0.0)
