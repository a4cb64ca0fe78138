"""Attention through torch's own variable-length kernels reading keys by block table, where the installed torch can.

torch 2.12 and newer take `block_table` and `seqused_k`, and pass them to FlashAttention 3 (any block size, Hopper) or
4 where such a package is installed and activated; the FlashAttention 2 inside torch refuses tables, and torch 2.11 has
no such parameters. So whether it works is found out by trying: see `engine.attention.choose`.

Its mask puts the newest keys under the newest queries. Steps in which tokens between are left out, since chunks brought
them, go to another backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from engine.attention import AttentionBackend, LayerPool, Packed

_NEEDED = {"block_table", "seqused_k", "window_size", "enable_gqa"}


class Unavailable(Exception):
    """This backend cannot serve here; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step for layers with the same window."""

    packed: Packed
    window: tuple[int, int]
    """Keys to the left and right that a query sees beside its own; -1 is no limit."""


@dataclass(frozen=True, slots=True, eq=False)
class Elsewhere:
    """One step as the other backend has planned it."""

    plan: Any


class VarlenBackend:
    """See the module."""

    name = "varlen"

    def __init__(self, function: Callable[..., Any], gaps: AttentionBackend) -> None:
        """`function` is torch's `varlen_attn`, or does the same; `gaps` computes what it cannot."""
        self._function, self._gaps = function, gaps

    def plan(self, packed: Packed, window: int | None, block_size: int) -> Plan | Elsewhere:
        """Nothing to prepare: the kernels plan on the device."""
        if packed.firsts is not None:
            return Elsewhere(self._gaps.plan(packed, window, block_size))
        # A window of one token is the token itself, which torch does not count.
        return Plan(packed, (-1 if window is None else window - 1, 0))

    def attend(self, queries: Tensor, pool: LayerPool, plan: Plan | Elsewhere, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """[N, H, D] to [N, H, D]."""
        if isinstance(plan, Elsewhere):
            return self._gaps.attend(queries, pool, plan.plan, fresh)
        packed = plan.packed
        seen: Tensor = self._function(
            queries,
            pool.keys,
            pool.values,
            packed.starts,
            None,
            max(packed.counts),
            max(packed.totals),
            window_size=plan.window,
            enable_gqa=True,
            seqused_k=packed.lengths,
            block_table=packed.tables,
        )
        return seen


def find(*, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """torch's function. Raises Unavailable. Activates the FlashAttention that is made for the device, process-wide."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"it needs CUDA and half precision, not {device.type} and {dtype}")
    function = _function()
    _activate("FA3" if torch.cuda.get_device_capability(device)[0] == 9 else "FA4")
    return function


def _function() -> Callable[..., Any]:
    """torch's function, if it knows block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no variable-length attention") from error
    missing = _NEEDED - set(inspect.signature(varlen_attn).parameters)
    if missing:
        raise Unavailable(f"torch {torch.__version__} has it without {', '.join(sorted(missing))}")
    return varlen_attn


def _activate(kernels: str) -> None:
    try:
        attention.activate_flash_attention_impl(kernels)
    except (ImportError, RuntimeError, ValueError) as error:
        raise Unavailable(f"{kernels} cannot be activated: {error}") from error
