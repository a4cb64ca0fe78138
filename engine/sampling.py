"""From scores to the next tokens of all answers of a step.

Nothing here keeps a generator: the number that decides token i of an answer is a hash of its seed and i. So a seed
gives the same answer whatever else is in the batch, and an answer that was set back and computed again goes on as
before.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

_PRESELECTED = 1024
"""Candidates among which `top_p` is tried first; sorting a whole vocabulary costs more than the rest of the step."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is drawn. Values are checked where requests are read."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are dropped."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Scores of tokens seen in prompt or answer are divided by it where positive, else multiplied (CTRL, 4.1)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    """End tokens are not drawn before this many others."""
    max_tokens: int = 16
    """0 draws nothing: only the prompt is computed."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report beside the chosen token's log probability; None reports nothing."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One drawn token, with what the model thought of it before temperature and penalties."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Guide(Protocol):
    """Rules which tokens may come next."""

    def mask(self) -> Tensor:
        """Bits of the allowed tokens, int32 [ceil(V / 32)] on the CPU, lowest bit first."""
        ...


class Drawing:
    """The state of one answer's draws."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], ends: Collection[int] = (), guide: Guide | None = None
    ) -> None:
        """`ends`: the tokens that end an answer."""
        self.params, self.guide = params, guide
        self._key = os.urandom(8) if params.seed is None else str(params.seed).encode()
        self._ends = sorted({*ends, *params.stop_token_ids})
        self._drawn = 0
        self._counts: Counter[int] = Counter()
        self._penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._repeated = set(prompt) if params.repetition_penalty != 1.0 else None
        self.adjusts = bool(
            self._penalised or self._repeated is not None or params.logit_bias or params.min_tokens or guide
        )
        """Whether `adjust` may change anything."""

    def uniform(self) -> float:
        """The number in [0, 1) that decides the next token."""
        digest = hashlib.blake2b(self._drawn.to_bytes(4, "little"), key=self._key[:64], digest_size=4).digest()
        return int.from_bytes(digest, "little") / 2**32

    def record(self, token: int) -> None:
        """Take note of a drawn token."""
        self._drawn += 1
        if self._penalised:
            self._counts[token] += 1
        if self._repeated is not None:
            self._repeated.add(token)

    def adjust(self, scores: Tensor) -> None:
        """Apply penalties, biases and rules to scores float32 [V], in place."""
        params, device = self.params, scores.device
        if self._repeated:
            ids = torch.tensor(list(self._repeated), device=device)
            known, factor = scores[ids], params.repetition_penalty
            scores[ids] = torch.where(known > 0, known / factor, known * factor)
        if self._counts:
            ids, counts = torch.tensor(list(self._counts.items()), device=device).unbind(1)
            scores[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=device)
            scores[ids] += torch.tensor(list(params.logit_bias.values()), device=device)
        if self._ends and self._drawn < params.min_tokens:
            scores[torch.tensor(self._ends, device=device)] = float("-inf")
        if self.guide is not None:
            allowed = _unpack(self.guide.mask(), len(scores)).to(device)
            scores.masked_fill_(~allowed, float("-inf"))


def draw(scores: Tensor, answers: Sequence[Drawing]) -> list[Choice]:
    """Draw one token for each of R answers from scores [R, V] of any dtype and device."""
    scores = scores.float()
    adjusted = scores
    if any(answer.adjusts for answer in answers):
        adjusted = scores.clone()
        for row, answer in zip(adjusted, answers, strict=True):
            answer.adjust(row)
    tokens = _choose(adjusted, answers)
    for answer, token in zip(answers, tokens, strict=True):
        answer.record(token)
    reported = [index for index, answer in enumerate(answers) if answer.params.logprobs is not None]
    if not reported:
        return [Choice(token) for token in tokens]
    described = describe(
        scores[reported], [tokens[i] for i in reported], [answers[i].params.logprobs or 0 for i in reported]
    )
    choices = dict(zip(reported, described, strict=True))
    return [choices.get(index) or Choice(token) for index, token in enumerate(tokens)]


def describe(scores: Tensor, tokens: Sequence[int], alternatives: Sequence[int]) -> list[Choice]:
    """Log probabilities of R tokens under scores [R, V], each with its `alternatives` likeliest ones."""
    logprobs = torch.log_softmax(scores.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in logprobs.topk(min(max(alternatives), logprobs.shape[1])))
    return [
        Choice(token, logprob, tuple(zip(ids[i][:wanted], values[i][:wanted], strict=True)))
        for i, (token, logprob, wanted) in enumerate(zip(tokens, chosen, alternatives, strict=True))
    ]


def _choose(scores: Tensor, answers: Sequence[Drawing]) -> list[int]:
    """The tokens themselves."""
    every = [answer.params for answer in answers]
    drawn = [i for i, params in enumerate(every) if params.temperature > 0]
    if not drawn:
        tokens: list[int] = scores.argmax(dim=-1).tolist()
        return tokens
    cut = {i for i in drawn if 0 < every[i].top_k < scores.shape[1] or every[i].top_p < 1.0 or every[i].min_p > 0.0}
    pieces: list[tuple[list[int], Tensor]] = []
    if len(drawn) < len(every):
        rest = [i for i, params in enumerate(every) if params.temperature == 0]
        pieces.append((rest, scores[rest].argmax(dim=-1)))
    for rows, pick in (([i for i in drawn if i not in cut], _pick), (sorted(cut), _pick_truncated)):
        if rows:
            chosen = scores if len(rows) == len(every) else scores[rows]
            warm = chosen / torch.tensor([[every[i].temperature] for i in rows], device=scores.device)
            chance = torch.tensor([[answers[i].uniform()] for i in rows], device=scores.device, dtype=torch.float64)
            pieces.append((rows, pick(warm, chance, [every[i] for i in rows])))
    order = [i for rows, _ in pieces for i in rows]
    found = torch.cat([part for _, part in pieces]).tolist()
    return [token for _, token in sorted(zip(order, found, strict=True))]


def _pick(scores: Tensor, chance: Tensor, _: Sequence[SamplingParams]) -> Tensor:
    """Tokens int64 [R] where the cumulative probability passes `chance` [R, 1]."""
    return _invert(torch.softmax(scores, dim=-1), chance)


def _pick_truncated(scores: Tensor, chance: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """As `_pick`, among the tokens that `top_k`, `top_p` and `min_p` leave."""
    probabilities, order = truncate(scores, params)
    return order.gather(1, _invert(probabilities, chance)[:, None])[:, 0]


def _invert(probabilities: Tensor, chance: Tensor) -> Tensor:
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # `chance` has 32 bits: in 53 the product stays below the last sum, so a token without probability is never met.
    return torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True)[:, 0]


def truncate(scores: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Probabilities [R, C] of the C likeliest tokens, likeliest first, and their ids [R, C]; dropped ones have 0.

    First all but the `top_k` likeliest are dropped, then all beyond mass `top_p` of the rest, then those below `min_p`
    of the likeliest. The token that crosses the mass is kept, so at least one always remains. Not normalised.
    """
    vocabulary = scores.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    wanted = max(limits)
    candidates = wanted if wanted <= _PRESELECTED else min(_PRESELECTED, vocabulary)
    kept = _truncated(scores, params, limits, candidates)
    if candidates < wanted and bool((kept[0][:, -1] > 0).any()):
        kept = _truncated(scores, params, limits, wanted)
    return kept


def _truncated(
    scores: Tensor, params: Sequence[SamplingParams], limits: Sequence[int], candidates: int
) -> tuple[Tensor, Tensor]:
    device = scores.device
    values, order = scores.topk(candidates, dim=-1)
    dropped = torch.arange(candidates, device=device) >= torch.tensor(limits, device=device)[:, None]
    values = values.masked_fill(dropped, float("-inf"))
    # Where `top_k` speaks, what it leaves is all there is; elsewhere also what is not among the candidates counts.
    limited = torch.tensor([[limit < scores.shape[1]] for limit in limits], device=device)
    total = torch.where(limited, values.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True))
    probabilities = (values - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    keep = before < torch.tensor([[p.top_p] for p in params], device=device)
    keep &= probabilities >= torch.tensor([[p.min_p] for p in params], device=device) * probabilities[:, :1]
    keep[:, 0] = True
    return probabilities * keep, order


def _unpack(mask: Tensor, size: int) -> Tensor:
    """Bits as bool [size]."""
    bits = (mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.bool().flatten()[:size]
