"""Keys and values as bytes, and back: what they are kept as where they are not used.

All codecs are pure functions over tensors of one shape, [layers, 2, tokens, kv_heads, head_dim], keys before values.
Everything but `raw` loses something; the bound that each keeps is in its docstring and tested. A code is read only with
the `Form` it was written for, which travels beside it: none describes itself.

Sources: KIVI (keys per channel, values per token; arXiv 2402.02750), RotateKV (Hadamard rotation, first tokens spared;
arXiv 2501.16383), CacheGen (few levels by depth, then entropy coding; arXiv 2310.07240), MiKV (the unimportant at low
precision rather than gone; arXiv 2402.18096).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Protocol

import torch
import zstandard
from torch import Tensor

from cachestore.kv import native

SINKS = 4
"""First tokens that the rotating codecs keep as they are: attention leans on them, and they are unlike the others."""
_GROUP = 64
"""Tokens that share the scale of a key channel."""
_LARGEST = 6.0e4
"""What a scale kept as float16 can still stand for."""
_MARGIN = 2.0**-10
"""Scales are rounded up and floors down by this much before they become float16, so that nothing is cut off."""


class Unfit(ValueError):
    """These values cannot be kept by this codec: not finite, or too large for its scales. `raw` takes them."""


class Damaged(ValueError):
    """The bytes are not a code of this form."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a code was made of: consecutive layers of one chunk."""

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    first: int = 0
    """Which of the model's layers is the first one here."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the tensor."""
        return (self.layers, 2, self.tokens, self.kv_heads, self.head_dim)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """One way to write keys and values down."""

    name: str
    """At most 16 ASCII characters; it stands in the header of what is stored."""

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """`kv` of `form.shape` and `form.dtype` on a CPU to uint8 [bytes].

        `importance` float [tokens]: which tokens matter more; most codecs have no use for it. Raises Unfit.
        """
        ...

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """uint8 [bytes], read only, to a new tensor of `form.shape` and `form.dtype`. Raises Damaged."""
        ...


class _Reader:
    """Takes sections off a code, one after the other."""

    def __init__(self, code: Tensor) -> None:
        self._code, self._at = code, 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The next section. Raises Damaged where there is not so much left."""
        size = math.prod(shape) * dtype.itemsize
        end = self._at + size
        if end > len(self._code):
            raise Damaged(f"{len(self._code)} bytes, of which a section ends at {end}")
        part, self._at = self._code[self._at : end], end
        if part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize:
            part = part.clone()
        return part.view(dtype).view(shape)

    def rest(self) -> Tensor:
        """All that is left."""
        part, self._at = self._code[self._at :], len(self._code)
        return part

    def end(self) -> None:
        """Raises Damaged where something is left."""
        if self._at != len(self._code):
            raise Damaged(f"{len(self._code) - self._at} bytes too many")


def _joined(*sections: Tensor) -> Tensor:
    return torch.cat([section.contiguous().flatten().view(torch.uint8) for section in sections])


class Raw:
    """The tensor as it lies in memory. Exact."""

    name = "raw"

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        return _joined(kv)

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """See `Codec`."""
        reader = _Reader(code)
        kv = reader.take(form.dtype, *form.shape)
        reader.end()
        return kv.clone()


class Fp8:
    """e4m3 with one scale per layer, K or V, and head: error ≤ 1/16 of a value, or 2^-17 of its head's largest."""

    name = "fp8"
    _TOP = 448.0

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        wide = kv.float()
        scale = _finite(wide.abs().amax((2, 4), keepdim=True), torch.inf) / self._TOP
        scale = torch.where(scale > 0, scale, 1.0)
        return _joined(scale, (wide / scale).clamp_(-self._TOP, self._TOP).to(torch.float8_e4m3fn))

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """See `Codec`."""
        reader = _Reader(code)
        scale = reader.take(torch.float32, form.layers, 2, 1, form.kv_heads, 1)
        values = reader.take(torch.float8_e4m3fn, *form.shape)
        reader.end()
        return (values.float() * scale).to(form.dtype)


class Int8:
    """Eight bits; keys share a scale and a floor per channel over 64 tokens, values a scale per token and head.

    Error ≤ 1/500 of the range of what shares a key's scale, ≤ 1/250 of the largest value that shares a value's, beside
    roundings to the tensor's own dtype. Scales are of that dtype: decoding takes a pass or two in it, rounded once.
    """

    name = "int8"

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        eps = torch.finfo(form.dtype).eps
        keys, values = _grouped(kv[:, 0].float()), kv[:, 1].float()
        low, high = keys.amin(2, keepdim=True), keys.amax(2, keepdim=True)
        _finite(torch.maximum(high, -low), _LARGEST)
        low = (low - low.abs() * eps).to(form.dtype)
        step = _scale(high - low.float(), 255, form.dtype)
        levels = (keys - low.float()).mul_(_inverse(step)).round_().clamp_(0, 255).to(torch.uint8)
        unit = _scale(_finite(values.abs().amax(3, keepdim=True), _LARGEST), 127, form.dtype)
        signed = (values * _inverse(unit)).round_().clamp_(-127, 127).to(torch.int8)
        return _joined(step, low, levels, unit, signed)

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """See `Codec`."""
        reader, (layers, _, tokens, heads, dim) = _Reader(code), form.shape
        groups = -(-tokens // _GROUP)
        step, low = (reader.take(form.dtype, layers, groups, 1, heads, dim) for _ in range(2))
        levels = reader.take(torch.uint8, layers, groups, _GROUP, heads, dim)
        unit = reader.take(form.dtype, layers, tokens, heads, 1)
        signed = reader.take(torch.int8, layers, tokens, heads, dim)
        reader.end()
        kv = torch.empty(form.shape, dtype=form.dtype)
        if native.ready(kv, step, low, unit):
            native.decode(kv, (step, low, levels), (unit, signed))
            return kv
        kv[:, 0] = torch.addcmul(low, levels.to(form.dtype), step).flatten(1, 2)[:, :tokens]
        torch.mul(signed, unit, out=kv[:, 1])
        return kv


class Rotated:
    """A Hadamard rotation of every head spreads what sticks out, then a few bits per token and head.

    Error of a head as a vector ≤ sqrt(head_dim) · range / (2 · (levels - 1)), where the range is that of the rotated
    head, since rotating keeps lengths. The first tokens are kept exactly.
    """

    def __init__(self, bits: int) -> None:
        """`bits`: 2 or 4."""
        self.name, self._bits = f"int{bits}", bits

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        if form.head_dim * self._bits % 8:
            raise Unfit(f"heads of {form.head_dim} do not fill bytes with {self._bits} bits each")
        turned = _rotated(kv[:, :, SINKS:].float())
        return _joined(*_quantised(turned, self._bits, dim=4), kv[:, :, :SINKS])

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """See `Codec`."""
        reader, (layers, both, tokens, heads, dim) = _Reader(code), form.shape
        sinks = min(SINKS, tokens)
        turned = _restored(reader, (layers, both, tokens - sinks, heads, dim), self._bits, dim=4)
        kept = reader.take(form.dtype, layers, both, sinks, heads, dim)
        reader.end()
        # The Hadamard matrix, scaled to keep lengths, is its own inverse.
        return torch.cat((kept, _rotated(turned).to(form.dtype)), dim=2)


class Entropy:
    """Few levels, more of them in early layers, one scale per token, layer and K or V; then zstd.

    Error ≤ 1/28 of the largest value of the token in that layer (1/60 where there are 32 levels), beside roundings to
    the tensor's own dtype, which scales are of.
    """

    name = "entropy"

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        wide, steps = kv.float(), _steps(form)
        unit = _scale(_finite(wide.abs().amax((3, 4), keepdim=True), _LARGEST), steps, form.dtype)
        levels = (wide * _inverse(unit)).round_().clamp_(-steps, steps).to(torch.int8)
        # Within a head, channels differ more than tokens do, but zstd finds more where channels lie side by side.
        packed = zstandard.ZstdCompressor(level=1).compress(levels.numpy().tobytes())
        return _joined(unit, torch.frombuffer(bytearray(packed), dtype=torch.uint8))

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """See `Codec`."""
        reader, size = _Reader(code), math.prod(form.shape)
        unit = reader.take(form.dtype, form.layers, 2, form.tokens, 1, 1)
        try:
            plain = zstandard.ZstdDecompressor().decompress(reader.rest().numpy().tobytes(), max_output_size=size)
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from error
        if len(plain) != size:
            raise Damaged(f"{len(plain)} levels instead of {size}")
        levels: Tensor = torch.frombuffer(bytearray(plain), dtype=torch.int8).view(form.shape)
        return levels * unit


class Mixed:
    """Important tokens as `int8` keeps them, all others as `int2` does.

    Where nobody says what is important, it is the tokens with long keys: of what can be seen without the attention,
    that cost the bundled model least. (For large models short keys are reported to matter more; arXiv 2406.11430.)
    """

    name = "mixed"
    _SHARE = 0.25

    def __init__(self) -> None:
        self._fine, self._coarse = Int8(), Rotated(2)

    def encode(self, kv: Tensor, form: Form, importance: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        if importance is None:
            importance = kv[:, 0].float().norm(dim=-1).mean((0, 2))
        fine, coarse = self._forms(form)
        chosen = torch.zeros(form.tokens, dtype=torch.bool)
        chosen[importance.topk(fine.tokens).indices] = True
        return _joined(
            self._coarse.encode(kv[:, :, ~chosen], coarse), self._fine.encode(kv[:, :, chosen], fine), chosen
        )

    def decode(self, code: Tensor, form: Form) -> Tensor:
        """See `Codec`."""
        fine, coarse = self._forms(form)
        if len(code) < form.tokens:
            raise Damaged(f"{len(code)} bytes for {form.tokens} tokens")
        chosen = code[-form.tokens :].bool()
        if int(chosen.sum()) != fine.tokens:
            raise Damaged(f"{int(chosen.sum())} important tokens instead of {fine.tokens}")
        border = rotated_bytes(coarse, 2)
        kv = torch.empty(form.shape, dtype=form.dtype)
        kv[:, :, ~chosen] = self._coarse.decode(code[:border], coarse)
        kv[:, :, chosen] = self._fine.decode(code[border : -form.tokens], fine)
        return kv

    def _forms(self, form: Form) -> tuple[Form, Form]:
        """Of the important tokens, and of the others."""
        count = math.ceil(form.tokens * self._SHARE)

        def of(tokens: int) -> Form:
            return Form(form.layers, tokens, form.kv_heads, form.head_dim, form.dtype, form.first)

        return of(count), of(form.tokens - count)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in (Raw(), Fp8(), Int8(), Rotated(4), Rotated(2), Entropy(), Mixed())}
)
"""By name."""


def rotated_bytes(form: Form, bits: int) -> int:
    """Bytes that `Rotated` writes."""
    rows = form.layers * 2 * form.kv_heads
    sinks = min(SINKS, form.tokens)
    return rows * (form.tokens - sinks) * (4 + form.head_dim * bits // 8) + rows * sinks * form.head_dim * (
        form.dtype.itemsize
    )


def _finite(sizes: Tensor, largest: float) -> Tensor:
    if not bool((sizes < largest).all()):
        raise Unfit(f"values up to {float(sizes.max())} in a codec for finite ones below {largest}")
    return sizes


def _scale(sizes: Tensor, steps: float | Tensor, dtype: torch.dtype) -> Tensor:
    """What a level stands for, so that `steps` of them reach as far as this, rounded up."""
    return (sizes / steps * (1 + torch.finfo(dtype).eps)).to(dtype)


def _inverse(scale: Tensor) -> Tensor:
    """float32; a scale too small for its dtype means that all values are, to it, nothing."""
    return torch.where(scale > 0, 1 / scale.float(), 0.0)


def _quantised(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step and floor, float16, of what shares them along `dim`, and the packed levels."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    _finite(torch.maximum(high, -low), _LARGEST)
    low = (low - low.abs() * _MARGIN).half()
    step = ((high - low.float()) * (1 + _MARGIN) / (2**bits - 1)).half()
    # A step too small for float16 means that all values are, to it, the floor.
    inverse = torch.where(step > 0, 1 / step.float(), 0.0)
    # Half a level more, cut off: rounded.
    levels = (x - low.float()).mul_(inverse).add_(0.5).clamp_(0, 2**bits - 0.5).to(torch.uint8)
    return step, low, _packed(levels, bits)


def _restored(reader: _Reader, shape: tuple[int, ...], bits: int, dim: int) -> Tensor:
    """float32 of `shape`, from what `_quantised` wrote."""
    shared = tuple(1 if axis == dim else size for axis, size in enumerate(shape))
    step, low = (reader.take(torch.float16, *shared).float() for _ in range(2))
    levels = _unpacked(reader.take(torch.uint8, *shape[:-1], shape[-1] * bits // 8), bits)
    return levels.float().mul_(step).add_(low)


def _packed(levels: Tensor, bits: int) -> Tensor:
    """Several levels a byte, along the last axis, whose length is a multiple of four."""
    if bits == 8:
        return levels
    parts = levels.view(*levels.shape[:-1], levels.shape[-1] * bits // 8, 8 // bits).unbind(-1)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        packed |= part << (index * bits)
    return packed


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    mask = 2**bits - 1
    parts: list[Tensor] = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _grouped(keys: Tensor) -> Tensor:
    """[L, T, H, D] to [L, groups, 64, H, D]; the last group is filled up with its last token, which widens no range."""
    missing = -keys.shape[1] % _GROUP
    if missing:
        keys = torch.cat((keys, keys[:, -1:].expand(-1, missing, -1, -1)), dim=1)
    return keys.reshape(len(keys), keys.shape[1] // _GROUP, _GROUP, *keys.shape[2:])


def _rotated(x: Tensor) -> Tensor:
    """Turn the last axis by a Hadamard matrix; where its length is no power of two, in blocks of the largest in it."""
    block = x.shape[-1] & -x.shape[-1]
    turned: Tensor = x.reshape(*x.shape[:-1], x.shape[-1] // block, block) @ _hadamard(block)
    return turned.flatten(-2)


@cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _steps(form: Form) -> Tensor:
    """Levels on either side of zero, float32 [layers, 2, 1, 1, 1]: CacheGen's bins, 32 in the first layers, then 16."""
    depth = torch.arange(form.first, form.first + form.layers)
    both = torch.stack((depth < 10, depth < 2), dim=1)
    return torch.where(both, 15.0, 7.0)[:, :, None, None, None]
