"""Which attention backend serves: the fastest that gives, here and for this model, what the plain one gives."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import assert_never

import torch
from torch import Tensor

from engine.attention import AttentionBackend, LayerPool, Packed, varlen
from engine.attention.paged import NAMES, PagedBackend
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import Unavailable
from engine.config import ModelConfig
from engine.cpu import LoopedOps
from engine.ops import Ops, PlainOps
from engine.settings import Attention

log = logging.getLogger("hitpath.engine")

_Trial = tuple[Packed, LayerPool, Tensor, tuple[Tensor, Tensor]]
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative error, ‖seen - expected‖ / ‖expected‖."""
_TIMED = (384, 128)
"""Tokens in the pool and new ones of the step by which CPU backends are compared: torch may use AMX for it, or not."""
_ROUNDS = 4


def choose(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device, block_size: int, wanted: Attention = "auto"
) -> AttentionBackend:
    """The backend that was asked for, or with `auto` the first of varlen, triton and sdpa that proves itself.

    Proving compiles the kernels too, so that no request waits for that. On other devices than CUDA `auto` is avx512, or
    avx2 in float32, if that proves itself and is the faster one here, else sdpa. Raises Unavailable where the one asked
    for by name cannot serve.
    """
    if wanted == "auto" and device.type != "cuda":
        return _for_cpu(config, dtype, device, block_size)
    candidates: tuple[Attention, ...] = ("varlen", "triton") if wanted == "auto" else (wanted,)
    for name in candidates:
        try:
            backend = _make(name, config, dtype, device, block_size)
            if name != "sdpa":
                prove(backend, config, dtype=dtype, device=device, block_size=block_size)
        except Unavailable as error:
            if wanted != "auto":
                raise Unavailable(f"attention backend {name!r} cannot be used: {error}") from error
            log.info("attention backend %s is not used: %s", name, error)
        else:
            return backend
    log.warning("attention runs on the plain backend, which is slow on %s; the lines before say why", device)
    return SdpaBackend()


def _for_cpu(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int) -> AttentionBackend:
    plain, name = SdpaBackend(), NAMES.get(dtype, "avx512")
    try:
        backend = _make(name, config, dtype, device, block_size)
        prove(backend, config, dtype=dtype, device=device, block_size=block_size)
    except Unavailable as error:
        log.info("attention backend %s is not used: %s", name, error)
        return plain
    ours, theirs = _seconds((backend, plain), _trial([_TIMED], 1, config, dtype, device, block_size), block_size)
    if ours <= theirs:
        return backend
    log.info("attention backend %s is not used: it takes %.1f times as long here", name, ours / theirs)
    return plain


def _seconds(backends: tuple[AttentionBackend, ...], trial: _Trial, block_size: int) -> list[float]:
    """Of the fastest of a few rounds each, in turns: others may use the machine."""
    packed, pool, queries, fresh = trial
    plans = [backend.plan(packed, None, block_size) for backend in backends]
    found = [float("inf")] * len(backends)
    for _ in range(_ROUNDS):
        for index, (backend, plan) in enumerate(zip(backends, plans, strict=True)):
            began = time.perf_counter()
            backend.attend(queries, pool, plan, fresh)
            found[index] = min(found[index], time.perf_counter() - began)
    return found


def choose_ops(config: ModelConfig, *, dtype: torch.dtype, device: torch.device, products: Ops) -> Ops:
    """Small steps in one pass each, if they are there and agree with the plain ones; else `products`, which has those.

    On CUDA these are Triton's, on a CPU compiled loops, beside the matrix products of `products`.
    """
    if device.type == "cpu":
        return _looped(config, dtype, device, products)
    try:
        from engine.fused import FusedOps

        prove_ops(FusedOps(), config, dtype=dtype, device=device)
    except (ImportError, Unavailable) as error:
        log.warning("small steps are not fused, which slows decoding: %s", error)
        return products
    return FusedOps()


def _looped(config: ModelConfig, dtype: torch.dtype, device: torch.device, products: Ops) -> Ops:
    try:
        looped = LoopedOps(products)
        if dtype not in (torch.bfloat16, torch.float32):
            raise Unavailable(f"they are for bfloat16 and float32, not {dtype}")
        prove_ops(looped, config, dtype=dtype, device=device)
    except (ImportError, Unavailable) as error:
        log.info("small steps are torch's: %s", error)
        return products
    return looped


def prove_ops(ops: Ops, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
    """Compare with the plain steps on random tensors of the model's shape. Raises Unavailable where they differ."""
    expected = _small_steps(PlainOps(), config, dtype, device)
    try:
        seen = _small_steps(ops, config, dtype, device)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(seen, expected, strict=True)]
    except Exception as failure:
        raise Unavailable(f"{type(failure).__name__}: {failure}") from failure
    if not all(error < _TOLERANCE[dtype] for error in errors):
        raise Unavailable(f"fused steps differ from the plain ones by {', '.join(f'{e:.2g}' for e in errors)}")


def _small_steps(ops: Ops, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Everything that the steps return and write, in float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden, dim, kv_heads, eps = config.hidden_size, config.head_dim, config.kv_heads, config.norm_eps
    x, delta, weight = random(3, hidden), random(3, hidden), random(hidden)
    mixed = random(3, config.heads + 2 * kv_heads, dim)
    cos, half = random(3, 1, dim // 2), random(3, 1, dim // 2)
    turn = (torch.cat((cos, cos), dim=-1), torch.cat((-half, half), dim=-1))
    norms = (random(dim), random(dim)) if config.qk_norm else None
    memory = LayerPool(*(torch.zeros(2, 4, kv_heads, dim, dtype=dtype, device=device) for _ in range(2)))
    slots = torch.tensor([1, 6, 2], device=device)
    both = random(3, 2 * config.intermediate_size)
    results = [
        ops.add_norm(x, None, weight, eps)[1],
        *ops.add_norm(x, delta, weight, eps),
        *ops.turn_write(mixed, turn, norms, eps, memory, slots),
        memory.keys,
        memory.values,
        ops.gate(both),
    ]
    return [result.float() for result in results]


def prove(
    backend: AttentionBackend, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, block_size: int
) -> None:
    """Compare with the plain twin on random steps of the model's shape. Raises Unavailable where they differ."""
    for packed, pool, queries, fresh in _trials(config, dtype, device, block_size):
        for window in dict.fromkeys(config.windows):
            plain = SdpaBackend()
            expected = plain.attend(queries, pool, plain.plan(packed, window, block_size), fresh).float()
            # Whatever a kernel, its compiler or its driver raises, there is another backend.
            try:
                seen = backend.attend(queries, pool, backend.plan(packed, window, block_size), fresh).float()
                error = float((seen - expected).norm() / expected.norm())
            except Exception as failure:
                raise Unavailable(f"{type(failure).__name__}: {failure}") from failure
            if not error < _TOLERANCE[dtype]:
                mix = f"{len(packed.counts)} sequences, up to {max(packed.totals)} tokens, window {window}"
                raise Unavailable(f"it differs from the plain backend by {error:.2g} ({mix})")


def _make(
    name: Attention, config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int
) -> AttentionBackend:
    match name:
        case "sdpa" | "auto":
            return SdpaBackend()
        case "avx512" | "avx2":
            if NAMES.get(dtype) != name:
                raise Unavailable(f"it does not compute in {dtype}")
            return PagedBackend(
                heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, dtype=dtype, device=device
            )
        case "varlen":
            function = varlen.find(dtype=dtype, device=device)
            return varlen.VarlenBackend(function, _for_gaps(config, dtype, device, block_size))
        case "triton":
            return _triton()(
                heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, dtype=dtype, device=device
            )
        case _ as never:
            assert_never(never)


def _for_gaps(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int) -> AttentionBackend:
    """What computes the steps that varlen cannot."""
    try:
        backend = _make("triton", config, dtype, device, block_size)
        prove(backend, config, dtype=dtype, device=device, block_size=block_size)
    except Unavailable as error:
        log.info("prompts with reused chunks are computed by the plain backend: %s", error)
        return SdpaBackend()
    return backend


def _triton() -> Callable[..., AttentionBackend]:
    try:
        from engine.attention.triton import TritonBackend
    except ImportError as error:
        raise Unavailable(f"triton is not installed: {error}") from error
    return TritonBackend


def _trials(config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int) -> Iterator[_Trial]:
    """Steps that reach every kernel: prompts beside decodes, also with gaps, a long decode, and many short ones."""
    prompts = [(0, 70), (2 * block_size, 1), (block_size + 1, 33)]
    for mix, every in ((prompts, 1), (prompts, 3), ([(1500, 1)], 1), ([(block_size, 1)] * 300, 1)):
        yield _trial(mix, every, config, dtype, device, block_size)


def _trial(
    mix: list[tuple[int, int]],
    every: int,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
) -> _Trial:
    """Sequences of (tokens in the pool, new tokens), over a pool of random numbers with their blocks in disorder.

    New tokens are the last of `every` so many; those between are in the pool.
    """
    generator = torch.Generator().manual_seed(0)
    counts = tuple(count for _, count in mix)
    totals = tuple(before + every * count for before, count in mix)
    firsts = tuple(before + every - 1 for before, _ in mix)
    width = -(-max(totals) // block_size)
    tables = torch.randperm(len(mix) * width, generator=generator).view(len(mix), width)
    positions = torch.cat([torch.arange(first, total, every) for first, total in zip(firsts, totals, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(mix)), torch.tensor(counts))
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    ends = list(accumulate(counts))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    pool_shape = (len(mix) * width, block_size, config.kv_heads, config.head_dim)
    pool = LayerPool(random(*pool_shape), random(*pool_shape))
    turned = random(len(positions), config.heads + config.kv_heads, config.head_dim)
    fresh = (turned[:, config.heads :], random(len(positions), config.kv_heads, config.head_dim))
    pool.write(slots.to(device), *fresh)
    packed = Packed(
        ids=torch.zeros_like(positions).to(device),
        positions=positions.to(device),
        slots=slots.to(device),
        tables=tables.to(device, torch.int32),
        starts=torch.tensor([0, *ends], dtype=torch.int32, device=device),
        lengths=torch.tensor(totals, dtype=torch.int32, device=device),
        counts=counts,
        totals=totals,
        drawing=torch.tensor([end - 1 for end in ends], device=device),
        firsts=firsts if every > 1 else None,
    )
    return packed, pool, turned[:, : config.heads], fresh
