"""Two loops compiled from `native.c`, where that could be built: decoding `int8`, and turning keys while placing them.

torch takes several passes for each and makes something new in every one. Whoever calls has a plain twin in torch for
when `ready` says no: no compiler at installation, another device or dtype. Both let go of the interpreter.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
from torch import Tensor


class _Loops(Protocol):
    """The compiled module; see there. Addresses come first, and nobody checks them."""

    def decode(self, *numbers: int) -> None: ...

    def place(self, *numbers: int) -> None: ...


def _built() -> _Loops | None:
    try:
        return cast(_Loops, importlib.import_module("cachestore.kv._native"))
    except ImportError:
        return None


_loops = _built()


def ready(*tensors: Tensor) -> bool:
    """Whether the loops are there, and these, all of one dtype, are what they can take."""
    if _loops is None:
        return False
    dtype = tensors[0].dtype
    return dtype in (torch.bfloat16, torch.float32) and all(
        one.dtype == dtype and one.device.type == "cpu" and one.is_contiguous() for one in tensors
    )


def decode(out: Tensor, keys: tuple[Tensor, Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
    """Fill `out` [L, 2, T, K, D] from sections of a code, all contiguous and not checked here.

    `keys`: step and floor [L, G, 1, K, D] of `out`'s dtype, levels uint8 [L, G, 64, K, D], G groups of 64 tokens.
    `values`: unit [L, T, K, 1] of `out`'s dtype, levels int8 [L, T, K, D].
    """
    assert _loops is not None
    layers, _, tokens, heads, dim = out.shape
    addresses = (one.data_ptr() for one in (out, *keys, *values))
    _loops.decode(*addresses, layers, tokens, heads, dim, out.itemsize)


def place(pool: Tensor, slots: Tensor | slice, keys: Tensor, by: tuple[Tensor, Tensor]) -> None:
    """Write `keys` [T, K, D], turned by cosines and sines float32 [T, 1, D] of `Rope`, to slots of `pool` [S, K, D].

    All contiguous; `slots` int64 [T] or a run of them, inside the pool: not checked here.
    """
    assert _loops is not None
    cosines, sines = (one.data_ptr() for one in by)
    at, first = (0, slots.start) if isinstance(slots, slice) else (slots.data_ptr(), 0)
    _loops.place(pool.data_ptr(), keys.data_ptr(), cosines, sines, at, first, *keys.shape, keys.itemsize)
