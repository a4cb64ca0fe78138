"""A backend serves only after it gave what the plain one gives."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import LayerPool, Packed
from engine.attention.choose import choose, choose_ops, prove, prove_ops
from engine.attention.sdpa import Plan, SdpaBackend
from engine.attention.varlen import Unavailable
from engine.config import ModelConfig, parse_config
from engine.cpu import LoopedOps
from engine.ops import PlainOps
from engine.settings import parse

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

CPU = torch.device("cpu")
COMPILED = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where Triton's kernels can run, compiled or interpreted."""


def config(**settings: Any) -> ModelConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    return parse_config({"model_type": "mistral", "sliding_window": 20, **sizes, **heads, **settings})


class Blind(SdpaBackend):
    """Forgets the window."""

    def plan(self, packed: Packed, window: int | None, block_size: int) -> Plan:
        return super().plan(packed, None, block_size)


class Broken(SdpaBackend):
    """Fails as a kernel does that was built for something else."""

    def attend(self, queries: Tensor, pool: LayerPool, plan: Plan, fresh: tuple[Tensor, Tensor]) -> Tensor:
        raise RuntimeError("no kernel image is available")


class Forgetful(PlainOps):
    """Leaves a gate open."""

    def gate(self, both: Tensor) -> Tensor:
        return both.chunk(2, dim=-1)[1]


def test_a_cpu_gets_the_plain_backend() -> None:
    assert choose(config(), dtype=torch.float32, device=CPU, block_size=16).name == "sdpa"


def test_a_cpu_gets_loops_for_small_steps_where_they_agree() -> None:
    products = PlainOps()
    chosen = choose_ops(config(model_type="qwen3"), dtype=torch.float32, device=CPU, products=products)
    assert isinstance(chosen, LoopedOps)
    assert chosen.linear == products.linear
    assert choose_ops(config(), dtype=torch.float16, device=CPU, products=products) is products


@pytest.mark.parametrize(
    ("name", "dtype", "other"), [("avx512", torch.bfloat16, torch.float32), ("avx2", torch.float32, torch.bfloat16)]
)
def test_a_cpu_with_the_instructions_can_have_the_backend_for_them(
    name: str, dtype: torch.dtype, other: torch.dtype
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 4096}
    made: dict[str, Any] = {"device": CPU, "block_size": 16}
    wanted = parse(["--model", "any", "--attention", name]).attention
    try:
        named = choose(config(**sizes), wanted=wanted, dtype=dtype, **made)
    except Unavailable as error:
        pytest.skip(str(error)) if "processor" in str(error) else pytest.fail(str(error))
    assert named.name == name
    # Which one is faster is the machine's to say.
    assert choose(config(**sizes), dtype=dtype, **made).name in (name, "sdpa")
    assert choose(config(hidden_size=128, head_dim=48), dtype=dtype, **made).name == "sdpa"
    with pytest.raises(Unavailable, match=rf"{name}.*{other}"):
        choose(config(**sizes), dtype=other, wanted=wanted, **made)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_steps_agree(family: str) -> None:
    fused = pytest.importorskip("engine.fused", reason="triton is not installed", exc_type=ImportError)
    prove_ops(fused.FusedOps(), config(model_type=family), dtype=torch.float32, device=COMPILED)


def test_fused_steps_that_differ_are_not_used() -> None:
    with pytest.raises(Unavailable, match="fused steps differ"):
        prove_ops(Forgetful(), config(), dtype=torch.float32, device=CPU)


def test_what_was_asked_for_and_cannot_serve_is_an_error() -> None:
    with pytest.raises(Unavailable, match="'varlen' cannot be used: it needs CUDA"):
        choose(config(), dtype=torch.float32, device=CPU, block_size=16, wanted="varlen")


def test_triton_serves_where_it_is_asked_for_and_agrees() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert choose(config(), dtype=torch.float32, device=COMPILED, block_size=16, wanted="triton").name == "triton"


def test_a_backend_that_differs_is_not_used() -> None:
    prove(SdpaBackend(), config(), dtype=torch.float32, device=CPU, block_size=16)
    prove(Blind(), config(sliding_window=None), dtype=torch.float32, device=CPU, block_size=16)
    with pytest.raises(Unavailable, match=r"differs .* window 20"):
        prove(Blind(), config(), dtype=torch.float32, device=CPU, block_size=16)


def test_a_backend_that_fails_is_not_used() -> None:
    with pytest.raises(Unavailable, match="RuntimeError: no kernel image"):
        prove(Broken(), config(), dtype=torch.float32, device=CPU, block_size=16)
