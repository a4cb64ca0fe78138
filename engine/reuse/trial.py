"""One prompt at a time through the model, with chunks of it reused: for measuring, and for deciding what is reused.

What the engine serves goes through the executor; this has a pool of its own, and no books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from engine.attention import AttentionBackend, KvPool, Packed
from engine.attention.choose import choose
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.model import Narrowing
from engine.reuse.blending import Blend, Selector
from engine.reuse.chunks import BlendPrompt, ChunkKv, ContextIndex
from engine.reuse.placing import place, take

BLOCK = 16


class Trial:
    """Room for one prompt of up to `capacity` tokens."""

    def __init__(self, checkpoint: Checkpoint, capacity: int, backend: AttentionBackend | None = None) -> None:
        """`backend`: of blocks of BLOCK tokens; None has one chosen, which takes longer than a short prompt."""
        config = checkpoint.config
        self._checkpoint = checkpoint
        self._backend = backend or choose(config, dtype=checkpoint.dtype, device=checkpoint.device, block_size=BLOCK)
        blocks = -(-capacity // BLOCK)
        self._pool = KvPool(
            layers=config.layers,
            blocks=blocks,
            block_size=BLOCK,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=checkpoint.dtype,
            device=checkpoint.device,
        )
        self._slots = torch.arange(blocks * BLOCK, device=checkpoint.device)
        self._table = torch.arange(blocks, dtype=torch.int32, device=checkpoint.device)[None]

    def compute(self, tokens: Sequence[int], last: int, narrowing: Narrowing | None = None) -> Tensor:
        """Logits [last, V] of the last tokens, everything computed."""
        rows = torch.arange(len(tokens), device=self._slots.device)
        return self._run(tokens, rows, last, narrowing)

    def pieces(self, tokens: Sequence[int], size: int, narrowing: Narrowing | None = None) -> Iterator[Tensor]:
        """As `compute`, so many tokens at a time; the last tensor, logits [1, V], is what the last token says."""
        for start in range(0, len(tokens), size):
            stop = min(start + size, len(tokens))
            rows = torch.arange(start, stop, device=self._slots.device)
            yield self._run(tokens[:stop], rows, 1, narrowing, span=len(tokens))

    def continued(self, tokens: Sequence[int], count: int, draw: Callable[[Tensor], int]) -> list[int]:
        """So many tokens more, each drawn from the scores [V] of the one before."""
        text = list(tokens)
        scores = self.compute(text, 1)
        while True:
            text.append(draw(scores[-1]))
            if len(text) == len(tokens) + count:
                return text[len(tokens) :]
            scores = self._run(text, torch.tensor([len(text) - 1], device=self._slots.device), 1, None)

    def chunk(self, tokens: Sequence[int], *, after: Sequence[int] = ()) -> ChunkKv:
        """The keys and values of these tokens, computed behind `after`."""
        whole = [*after, *tokens]
        self.compute(whole, 1)
        return self.taken(whole, len(after), len(whole))

    def taken(self, tokens: Sequence[int], start: int, stop: int, context: ContextIndex | None = None) -> ChunkKv:
        """A chunk out of the prompt computed last, which was `tokens`."""
        layers = take(self._pool, self._slots[start:stop], self._checkpoint.model.rope, start, len(tokens))
        return ChunkKv(tuple(tokens[start:stop]), layers, before=start, span=len(tokens), context=context)

    def blend(self, prompt: BlendPrompt, selector: Selector, last: int, *, turned: bool = True) -> Tensor:
        """Logits [last, V] of the last tokens, chunks reused as `selector` says."""
        return self.run(prompt, Blend(prompt, selector, last), last, turned=turned)

    def run(self, prompt: BlendPrompt, blend: Blend, last: int = 1, *, turned: bool = True) -> Tensor:
        """As `blend`, for who wants to see afterwards what was computed."""
        place(self._pool, prompt, self._slots[: len(prompt.tokens)], self._checkpoint.model.rope, turned=turned)
        return self._run(prompt.tokens, blend.rows, last, blend)

    def decoded(self, tokens: Sequence[int], first: int, repairs: Sequence[Sequence[int]]) -> Tensor:
        """Logits [N - first, V] of the tokens from `first` on, one at a time as drawn ones are, behind what is there.

        `repairs`: beside each of them, the tokens before that are computed again; ascending.
        """
        steps = zip(range(first, len(tokens)), repairs, strict=True)
        device = self._slots.device
        return torch.cat(
            [self._run(tokens[: at + 1], torch.tensor([*rows, at], device=device), 1, None) for at, rows in steps]
        )

    def _run(
        self, tokens: Sequence[int], rows: Tensor, last: int, narrowing: Narrowing | None, span: int | None = None
    ) -> Tensor:
        """`span`: length of the whole text, where these are its first tokens."""
        model, total, count = self._checkpoint.model, len(tokens), len(rows)
        ids = torch.tensor(tokens, device=rows.device)
        packed = Packed(
            ids=ids[rows],
            positions=rows,
            slots=self._slots[rows],
            tables=self._table[:, : -(-total // BLOCK)],
            starts=torch.tensor([0, count], dtype=torch.int32, device=rows.device),
            lengths=torch.tensor([total], dtype=torch.int32, device=rows.device),
            counts=(count,),
            totals=(total,),
            drawing=torch.arange(count - last, count, device=rows.device),
            spans=torch.full_like(rows, span or total) if model.rope.stretches else None,
            firsts=(int(rows[0]),),
        )
        with torch.inference_mode():
            return model.logits(model.forward(packed, self._pool, self._backend, narrowing))


def operations(config: ModelConfig, computed: Iterable[Tensor]) -> float:
    """Multiplications of computing tokens at these positions, layer by layer; each attends to all up to itself."""
    e, kv = config.hidden_size, config.kv_heads * config.head_dim
    q = config.heads * config.head_dim
    per_token = e * (2 * q + 2 * kv + 3 * config.intermediate_size)
    return sum(len(at) * per_token + 2 * q * int((at + 1).sum()) for at in computed)
