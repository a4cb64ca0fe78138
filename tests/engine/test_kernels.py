"""The kernels compile for Hopper as they are launched there, without a GPU; the interpreter accepts more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from engine import kernels

def compile(kernel, pointers, numbers, constants, warps, stages):
    types = {**pointers, **numbers}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    print(kernel.__name__, done.metadata.shared, "wgmma" in done.asm["ptx"])

half = dict.fromkeys(("queries", "keys", "values", "out"), "*bf16")
tables = dict.fromkeys(("starts", "tables", "lengths", "members", "tiles"), "*i32") | {"positions": "*i64"}
llama = dict(STRIDE_Q=5120, STRIDE_OUT=4096, ROW=1024, GROUP=4, SIZE=16, DIM=128, BLOCK_N=64, BLOCK_D=128)
scale = {"scale": "fp32", "stride_table": "i32"}
pick = lambda kernel, types: {name: types[name] for name in kernel.arg_names if name in types}
compile(kernels.prefill, pick(kernels.prefill, half | tables), scale,
        llama | dict(PADDED=4, WINDOW=512, BLOCK_M=128), 8, 5)
for whole in (True, False):
    scratch = dict.fromkeys(("partial", "levels"), "*bf16" if whole else "*fp32")
    compile(kernels.decode, pick(kernels.decode, half | tables) | scratch, scale | {"splits": "i32"},
            llama | dict(WINDOW=0, WHOLE=whole, BLOCK_M=16), 4, 5)
compile(kernels.reduce, {"partial": "*fp32", "levels": "*fp32", "out": "*bf16", "starts": "*i32", "members": "*i32"},
        {"splits": "i32"}, dict(STRIDE_OUT=4096, DIM=128, BLOCK_D=128, MOST=64), 4, 3)
compile(kernels.add_norm, dict.fromkeys(("x", "delta", "weight", "summed", "normed"), "*bf16"), {"eps": "fp32"},
        dict(SIZE=4096, ADD=True, BLOCK=4096), 8, 3)
compile(kernels.turn_write, dict.fromkeys(("mixed", "cos", "sin", "keys", "values", "query_norm", "key_norm"), "*bf16")
        | {"slots": "*i64"}, {"eps": "fp32"}, dict(HEADS=32, KV_HEADS=8, DIM=128, NORM=True, BLOCK_H=8, HALF=64), 2, 3)
compile(kernels.gate, {"both": "*bf16", "out": "*bf16"}, {}, dict(SIZE=14336, BLOCK=1024), 4, 3)
"""
HOPPER_SHARED_MEMORY = 232_448


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in compiled] == [
        "prefill", "decode", "decode", "reduce", "add_norm", "turn_write", "gate",
    ]  # fmt: skip
    assert all(int(shared) <= HOPPER_SHARED_MEMORY for _, shared, _ in compiled)
    assert compiled[0][2] == "True", "prompts use Hopper's matrix units"
