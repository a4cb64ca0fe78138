"""The compiled loops give what torch gives, up to one rounding, and touch nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cachestore.kv import native
from cachestore.kv.codecs import CODECS, Form

dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def near(found: Tensor, wanted: Tensor) -> bool:
    """`wanted` is in float32: rounded to the dtype of `found`, and differing by a last place at most."""
    eps = torch.finfo(found.dtype).eps
    return torch.allclose(found.float(), wanted, rtol=eps, atol=1e-6)


def test_they_were_built() -> None:
    assert native.ready(torch.zeros(1))


def test_what_they_cannot_take_is_left_to_torch() -> None:
    assert not native.ready(torch.zeros(1, dtype=torch.float16))
    assert not native.ready(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not native.ready(torch.zeros(2, 2).t()[:1])
    assert not native.ready(torch.zeros(1, device="meta"))


@given(
    layers=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 63, 64, 65, 130]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([4, 20, 64, 128]),
    dtype=dtypes,
    seed=st.integers(0, 2**16),
)
def test_decoding(layers: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    groups = -(-tokens // 64)
    step, low = (torch.randn(layers, groups, 1, heads, dim, generator=chance).to(dtype) for _ in range(2))
    levels = torch.randint(0, 256, (layers, groups, 64, heads, dim), generator=chance).to(torch.uint8)
    unit = torch.randn(layers, tokens, heads, 1, generator=chance).to(dtype)
    signed = torch.randint(-127, 128, (layers, tokens, heads, dim), generator=chance).to(torch.int8)
    out = torch.full((layers, 2, tokens, heads, dim), torch.nan, dtype=dtype)
    native.decode(out, (step, low, levels), (unit, signed))
    keys = (low.float() + levels.float() * step.float()).flatten(1, 2)[:, :tokens]
    assert near(out[:, 0], keys)
    assert near(out[:, 1], signed.float() * unit.float())


@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    dim=st.sampled_from([4, 20, 64, 128]),
    dtype=dtypes,
    scattered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_placing(tokens: int, heads: int, dim: int, dtype: torch.dtype, scattered: bool, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, heads, dim, generator=chance).to(dtype)
    cosines, sines = (torch.randn(tokens, 1, dim, generator=chance) for _ in range(2))
    where = torch.randperm(64, generator=chance)[:tokens] if scattered else torch.arange(7, 7 + tokens)
    pool = torch.zeros(64, heads, dim, dtype=dtype)
    native.place(pool, where if scattered else slice(7, 7 + tokens), keys, (cosines, sines))
    swapped = torch.cat((keys[..., dim // 2 :], keys[..., : dim // 2]), dim=-1).float()
    products = torch.stack((keys.float() * cosines, swapped * sines))
    # Where the two nearly cancel out, what is left has the products' roundings.
    assert torch.allclose(
        pool[where].float(), products.sum(0), rtol=torch.finfo(dtype).eps, atol=float(products.abs().max()) * 1e-6
    )
    assert not pool[torch.tensor([place not in where.tolist() for place in range(64)])].any()


def test_numbers_that_are_none_and_that_overflow() -> None:
    """As torch rounds them, bit for bit: int8 refuses them, but chunks of other codecs are placed too."""
    hard = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.3e38, 1e-40, -0.0, 1.0, 257 / 256])
    keys = hard.bfloat16().repeat(2)[None, None]
    pool = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    ones, zeros = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    native.place(pool, slice(0, 1), keys, (ones, zeros))
    wanted = (keys.float() * ones + keys.float().roll(8, -1) * zeros).bfloat16()
    assert torch.equal(pool.isnan(), wanted.isnan())
    assert torch.equal(pool.nan_to_num(), wanted.nan_to_num())


def test_a_code_of_a_dtype_they_do_not_know_is_decoded_all_the_same() -> None:
    form = Form(2, 70, 2, 8, torch.float16)
    kv = torch.randn(form.shape, generator=torch.Generator().manual_seed(0)).half()
    back = CODECS["int8"].decode(CODECS["int8"].encode(kv, form), form)
    assert torch.allclose(back, kv, atol=0.05)
