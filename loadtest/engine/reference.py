"""What transformers does with the same checkpoint: `generate` for one prompt, continuous batching for many."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from loadtest.bench_client import BenchError

_PAGE = 256
_TOKEN_BUDGET = 512
"""As the engine's own. Its default, 8192, computes a mask of that height at every step on a CPU."""


class Reference:
    """A model of transformers."""

    def __init__(self, directory: Path, dtype: torch.dtype, *, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa"
        ).eval()

    def decode(self, prompt: Sequence[int], tokens: int) -> float:
        """Tokens per second after the first, by `generate`, greedy. Raises BenchError when it stops early."""
        stamps = _Stamps()
        with torch.inference_mode():
            self._model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), streamer=stamps, **_greedy(tokens)
            )
        drawn = stamps.times[1:]  # the first is the prompt
        if len(drawn) != tokens:
            raise BenchError(f"transformers generated {len(drawn)} tokens, not {tokens}")
        return (len(drawn) - 1) / (drawn[-1] - drawn[0])

    def together(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds for all, by continuous batching. Raises BenchError when an answer is not whole."""
        longest = max(map(len, prompts)) + tokens
        settings = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=len(prompts) * -(-longest // _PAGE) + 1,
            max_batch_tokens=_TOKEN_BUDGET,
            auto_switch_to_flash=False,
        )
        config = transformers.GenerationConfig(**{**_greedy(tokens), "eos_token_id": -1})
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        with (
            torch.inference_mode(),
            self._model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=settings, warmup=False
            ) as manager,
        ):
            began = time.perf_counter()
            manager.add_requests(inputs=[list(prompt) for prompt in prompts], max_new_tokens=tokens)
            lengths = [len(self._next(manager).generated_tokens) for _ in prompts]
            seconds = time.perf_counter() - began
        if lengths != [tokens] * len(prompts):
            raise BenchError(f"transformers generated {lengths} tokens, not {tokens} each")
        return seconds

    @staticmethod
    def _next(manager: Any) -> Any:
        while manager.is_running():
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                return result
        raise BenchError("the continuous batching of transformers ended early")


class _Stamps(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""


def _greedy(tokens: int) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
