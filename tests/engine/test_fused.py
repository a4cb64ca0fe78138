"""Steps in one pass give what the plain ones give: Triton's (interpreted without a GPU), and loops for CPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from engine.attention import LayerPool  # noqa: E402
from engine.config import RopeConfig  # noqa: E402
from engine.cpu import LoopedOps  # noqa: E402
from engine.ops import PlainOps  # noqa: E402
from engine.rope import Rope  # noqa: E402

PLAIN = PlainOps()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(name="fused", params=["triton", "loops"])
def fused_ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "loops":
        dtype = request.node.callspec.params["dtype"]
        if DEVICE != "cpu" or dtype is torch.float16:
            pytest.skip("they are for float32 and bfloat16 on a CPU")
        return LoopedOps(PLAIN)
    return pytest.importorskip("engine.fused", reason="triton is not installed", exc_type=ImportError).FusedOps()


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def close(seen: torch.Tensor, expected: torch.Tensor) -> None:
    assert seen.dtype == expected.dtype
    tolerance = TOLERANCE[seen.dtype]
    torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(5, 48), (5, 256), (3, 57), (300, 256)])
@pytest.mark.parametrize("adding", [True, False])
def test_add_norm(fused: Any, dtype: torch.dtype, rows: int, size: int, adding: bool) -> None:
    torch.manual_seed(0)
    x, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype)
    delta = random(rows, size, dtype=dtype) if adding else None
    for seen, expected in zip(
        fused.add_norm(x, delta, weight, 1e-5), PLAIN.add_norm(x, delta, weight, 1e-5), strict=True
    ):
        close(seen, expected)


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (7, 1, 12), (12, 4, 64)])
@pytest.mark.parametrize("normed", [True, False])
def test_turn_write(fused: Any, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, normed: bool) -> None:
    torch.manual_seed(0)
    slots = torch.tensor([5, 11, 0, 6], device=DEVICE)
    positions = torch.tensor([3, 900, 0, 7], device=DEVICE)
    rope = Rope(RopeConfig("default", 10_000.0), dim, 1024, device=torch.device(DEVICE))
    cos, sin = (angle.to(dtype) for angle in rope(positions))
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype)) if normed else None
    mixed = random(4, heads + 2 * kv_heads, dim, dtype=dtype)
    results = []
    for ops in (fused, PLAIN):
        memory = LayerPool(*(torch.zeros(3, 4, kv_heads, dim, dtype=dtype, device=DEVICE) for _ in range(2)))
        results.append(
            (*ops.turn_write(mixed.clone(), (cos, sin), norms, 1e-6, memory, slots), memory.keys, memory.values)
        )
    for seen, expected in zip(*results, strict=True):
        close(seen, expected)


@DTYPES
@pytest.mark.parametrize("size", [40, 1500])
def test_gate(fused: Any, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    both = random(3, 2 * size, dtype=dtype)
    close(fused.gate(both), PLAIN.gate(both))


def test_gates_that_are_far_open_or_shut() -> None:
    """Also where e to the power of it does not fit into a float32."""
    gates = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 200.0, 1e30])
    both = torch.cat((gates, torch.ones_like(gates)))[None]
    torch.testing.assert_close(LoopedOps(PLAIN).gate(both), PLAIN.gate(both), rtol=1e-6, atol=1e-30)


def test_rows_that_many_threads_share_are_the_same() -> None:
    both, before = torch.randn(400, 512), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        close(LoopedOps(PLAIN).gate(both), PLAIN.gate(both))
    finally:
        torch.set_num_threads(before)
