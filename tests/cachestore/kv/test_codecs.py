"""Every codec keeps its bound, whatever the values; and refuses what is not its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachestore.kv.codecs import CODECS, SINKS, Damaged, Form, Mixed, Unfit, rotated_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
forms = st.builds(
    Form,
    layers=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 63, 64, 65, 130]),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 20, 64]),
    dtype=st.sampled_from(DTYPES),
    first=st.sampled_from([0, 1, 9, 30]),
)


def sample(form: Form, seed: int, outliers: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(form.shape, generator=generator) * 10 ** float(torch.rand((), generator=generator) * 5 - 4)
    if outliers:
        kv[:, 0, :, :, 1] *= 30
        kv[:, :, 0] *= 10
    return kv.to(form.dtype)


def rounding(kv: Tensor) -> Tensor:
    """What turning a number of this size into the tensor's dtype may cost, and float16 scales of tiny numbers."""
    return kv.float().abs() * torch.finfo(kv.dtype).eps + 1e-4 * kv.float().abs().amax() + 2e-4


def spread(x: Tensor, *dims: int) -> Tensor:
    return x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True)


def bound(name: str, kv: Tensor, form: Form) -> Tensor:
    wide = kv.float()
    match name:
        case "raw":
            return torch.zeros_like(wide)
        case "fp8":
            return wide.abs() / 16 + wide.abs().amax((2, 4), keepdim=True) * 2.0**-17 + rounding(kv)
        case "int8":
            keys, values = wide[:, :1], wide[:, 1:]
            parts = (
                spread(keys, 2).expand(keys.shape) / 500,
                values.abs().amax(4, keepdim=True).expand(keys.shape) / 250,
            )
            return torch.cat(parts, 1) + rounding(kv)
        case "entropy":
            fine = torch.tensor([[layer < 10, layer < 2] for layer in range(form.first, form.first + form.layers)])
            share = torch.where(fine, 1 / 29, 1 / 13.5)[:, :, None, None, None]
            return wide.abs().amax((3, 4), keepdim=True) * share + rounding(kv)
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize("name", ["raw", "fp8", "int8", "entropy"])
@settings(max_examples=40)
@given(form=forms, seed=st.integers(0, 999), outliers=st.booleans())
def test_no_value_is_further_off_than_its_bound(name: str, form: Form, seed: int, outliers: bool) -> None:
    kv = sample(form, seed, outliers)
    back = CODECS[name].decode(CODECS[name].encode(kv, form), form)
    assert back.dtype == kv.dtype
    assert bool(((back.float() - kv.float()).abs() <= bound(name, kv, form)).all())


@pytest.mark.parametrize(("name", "levels"), [("int4", 15), ("int2", 3)])
@settings(max_examples=40)
@given(form=forms, seed=st.integers(0, 999), outliers=st.booleans())
def test_no_head_is_further_off_than_its_bound(name: str, levels: int, form: Form, seed: int, outliers: bool) -> None:
    if form.head_dim * (2 if levels == 3 else 4) % 8:
        return
    kv = sample(form, seed, outliers)
    code = CODECS[name].encode(kv, form)
    assert len(code) == rotated_bytes(form, 4 if levels == 15 else 2)
    back = CODECS[name].decode(code, form)
    assert torch.equal(back[:, :, :SINKS], kv[:, :, :SINKS])
    error = (back.float() - kv.float()).norm(dim=-1)
    # Every rotated value lies within the head's length on either side of zero.
    length = kv.float().norm(dim=-1)
    allowed = math.sqrt(form.head_dim) * (2 * length / (2 * levels)) * 1.01
    assert bool((error <= allowed + math.sqrt(form.head_dim) * rounding(kv).amax(-1)).all())


@settings(max_examples=40)
@given(form=forms, seed=st.integers(0, 999))
def test_the_important_are_kept_as_well_as_by_int8(form: Form, seed: int) -> None:
    kv = sample(form, seed, outliers=False)
    importance = torch.rand(form.tokens, generator=torch.Generator().manual_seed(seed))
    codec = Mixed()
    back = codec.decode(codec.encode(kv, form, importance), form)
    chosen = importance.topk(math.ceil(form.tokens / 4)).indices
    part = kv[:, :, chosen]
    assert bool(((back[:, :, chosen] - part).float().abs() <= bound("int8", part, form)).all())


@pytest.mark.parametrize("name", CODECS)
def test_no_code_says_too_little_or_too_much(name: str) -> None:
    form = Form(2, 70, 2, 8, torch.bfloat16)
    code = CODECS[name].encode(sample(form, 1, False), form)
    for wrong in (code[:-1], code[: len(code) // 2], code[:0]):
        with pytest.raises(Damaged):
            CODECS[name].decode(wrong, form)


@pytest.mark.parametrize("name", sorted(CODECS.keys() - {"raw"}))
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
def test_what_cannot_be_kept_is_refused(name: str, value: float) -> None:
    form = Form(1, 8, 1, 8, torch.float32)
    kv = sample(form, 2, False)
    kv[0, 1, 6, 0, 3] = value
    if name == "fp8" and value == 1e30:
        pytest.skip("its scale is float32")
    with pytest.raises(Unfit):
        CODECS[name].encode(kv, form, torch.zeros(8))


@pytest.mark.parametrize("name", CODECS)
def test_nothing_stays_nothing(name: str) -> None:
    form = Form(2, 33, 2, 16, torch.float16)
    back = CODECS[name].decode(CODECS[name].encode(torch.zeros(form.shape, dtype=form.dtype), form), form)
    assert not back.any()


@pytest.mark.parametrize("name", CODECS)
def test_codes_need_not_be_aligned(name: str) -> None:
    form = Form(1, 7, 1, 8, torch.float32)
    code = CODECS[name].encode(sample(form, 3, True), form)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), code))[1:]
    assert torch.equal(CODECS[name].decode(shifted, form), CODECS[name].decode(code, form))


def test_sizes() -> None:
    form = Form(4, 256, 2, 128, torch.bfloat16)
    kv = sample(form, 4, False)
    sizes = {name: len(codec.encode(kv, form)) / form.nbytes for name, codec in CODECS.items()}
    assert sizes == pytest.approx(
        {"raw": 1.0, "fp8": 0.5, "int8": 0.512, "int4": 0.271, "int2": 0.147, "entropy": 0.24, "mixed": 0.24}, abs=0.03
    )
