"""One contract for every attention backend that can run here, against the plain formula in float64.

On a machine with a GPU the same tests run there, compiled; elsewhere Triton's kernels are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from engine.attention import AttentionBackend
from engine.attention.paged import PagedBackend
from engine.attention.sdpa import SdpaBackend
from engine.attention.varlen import Unavailable, VarlenBackend
from tests.engine.paged import Layout, Sample, Shape, expected, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sdpa(shape: Shape) -> AttentionBackend:
    return SdpaBackend()


def triton(shape: Shape) -> AttentionBackend:
    module = pytest.importorskip("engine.attention.triton", reason="triton is not installed", exc_type=ImportError)
    backend = module.TritonBackend(
        heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.dim, dtype=shape.dtype, device=DEVICE
    )
    return cast(AttentionBackend, backend)


def paged(shape: Shape) -> AttentionBackend:
    try:
        return PagedBackend(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            dtype=shape.dtype,
            device=torch.device("cpu"),
        )
    except Unavailable as error:
        if "processor" not in str(error):
            raise
        pytest.skip(str(error))


def varlen(shape: Shape) -> AttentionBackend:
    return VarlenBackend(documented_varlen, SdpaBackend())


def documented_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What torch documents of its `varlen_attn` with block tables: the newest keys belong to the newest queries."""
    assert enable_gqa
    assert window_size[1] == 0
    out = torch.empty_like(queries)
    for index, total in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seq_q[index]), int(cu_seq_q[index + 1]))
        count = rows.stop - rows.start
        assert count <= max_q
        assert total <= max_k
        at = torch.arange(total, device=queries.device)
        distance = at[total - count :, None] - at[None]
        mask = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        own = [part[block_table[index].long()].flatten(0, 1)[:total] for part in (keys, values)]
        q, k, v = (part.transpose(0, 1)[None] for part in (queries[rows], *own))
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out[rows] = seen[0].transpose(0, 1)
    return out


BACKENDS = [sdpa, paged, varlen, triton]
Make = Callable[[Shape], AttentionBackend]


def agrees(make: Make, shape: Shape, step: Sample) -> None:
    backend = make(shape)
    plan = backend.plan(step.packed, shape.window, shape.block_size)
    seen = backend.attend(step.queries, step.pool, plan, step.fresh)
    assert seen.shape == step.queries.shape
    assert seen.is_contiguous()
    torch.testing.assert_close(seen.double(), expected(shape, step), rtol=0, atol=TOLERANCE[shape.dtype])


def fitting(make: Make, shape: Shape) -> Shape:
    """The shape, or one like it that the backend can take."""
    if make is paged:
        dtype = torch.bfloat16 if shape.dtype is torch.float16 else shape.dtype
        return replace(shape, dtype=dtype, dim=max(32, shape.dim))
    # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers.
    if make is triton and DEVICE == "cpu" and shape.dtype is torch.bfloat16:
        return replace(shape, dtype=torch.float16)
    return shape


counts = st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 20)))


@pytest.mark.parametrize("make", BACKENDS)
@settings(max_examples=15)
@given(
    mix=st.lists(counts, min_size=1, max_size=5),
    layout=st.sampled_from(["adjacent", "scattered", "shared"]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 4, 7]),
    dim=st.sampled_from([16, 64, 96, 128]),
    block_size=st.sampled_from([4, 8, 16, 32]),
    window=st.sampled_from([None, 1, 5, 33]),
    every=st.sampled_from([1, 1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_mix(
    make: Make,
    mix: list[tuple[int, int]],
    layout: Layout,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    window: int | None,
    every: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    shape = fitting(make, Shape(kv_heads, group, dim, block_size, window, dtype))
    agrees(make, shape, sample(shape, mix, layout=layout, every=every, seed=seed, device=DEVICE))


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "mix",
    [
        [(0, 150), (37, 90)],  # several tiles of rows, with and without keys from before
        [(260, 1), (0, 1), (64, 1), (63, 1)],  # decoding only, long enough for splits
        [(200, 1)] * 20,  # so many that nothing is split
        [(250, 1), (0, 70), (130, 1), (3, 40)],  # both
    ],
)
def test_across_tiles(make: Make, mix: list[tuple[int, int]], every: int, window: int | None) -> None:
    shape = fitting(make, Shape(kv_heads=1, group=4, dim=64, block_size=16, window=window))
    agrees(make, shape, sample(shape, mix, layout="shared", every=every, device=DEVICE))


@pytest.mark.parametrize("make", [paged, triton])
def test_every_key_position_between_tiles(make: Make) -> None:
    """Lengths around the borders of the kernels' tiles of keys, as one decode and as one prompt each."""
    shape = fitting(make, Shape(kv_heads=1, group=1, dim=16, block_size=8, dtype=torch.float16))
    edges = [15, 16, 17, 63, 64, 65, 127, 128, 129]
    agrees(make, shape, sample(shape, [(edge - 1, 1) for edge in edges], device=DEVICE))
    agrees(make, shape, sample(shape, [(edge - 2, 2) for edge in edges], device=DEVICE))


def test_what_is_in_unused_places_does_not_matter() -> None:
    """Blocks behind a sequence's last token may hold anything, not-a-numbers of an earlier request too."""
    shape = Shape(kv_heads=2, group=2, dim=64, block_size=16, dtype=torch.bfloat16)
    step = sample(shape, [(0, 37), (130, 3), (5, 1)])
    used = torch.zeros(step.pool.keys.shape[:2], dtype=torch.bool)
    for table, total in zip(step.packed.tables.tolist(), step.packed.totals, strict=True):
        for token in range(total):
            used[table[token // 16], token % 16] = True
    for part in (step.pool.keys, step.pool.values):
        part[~used] = torch.nan
    agrees(paged, shape, step)


def test_threads_share_tiles() -> None:
    shape = Shape(kv_heads=2, group=2, dim=64, block_size=16, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        agrees(paged, shape, sample(shape, [(0, 400), (300, 1), (9, 65)], every=2))
    finally:
        torch.set_num_threads(before)


def test_shapes_that_do_not_fit_are_refused_by_what_is_wrong() -> None:
    for shape, word in (
        (Shape(dtype=torch.float16, dim=64), "float16"),
        (Shape(dtype=torch.bfloat16, dim=48), "48"),
        (Shape(dtype=torch.bfloat16, dim=288), "288"),
    ):
        with pytest.raises(Unavailable, match=word):
            paged(shape)


def test_splits_fill_the_processors_and_bound_every_stretch() -> None:
    splits_for = pytest.importorskip(
        "engine.attention.triton", reason="triton is not installed", exc_type=ImportError
    ).splits_for
    assert splits_for(1, 8, 8192, 132) == 33
    assert splits_for(64, 8, 1000, 132) == 1
    assert splits_for(64, 8, 131_072, 132) == 8
    assert splits_for(1, 1, 5, 132) == 1
    assert splits_for(1, 1, 1_000_000, 132) == 64
