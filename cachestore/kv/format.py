"""What lies on the shelves: the names of chunks, and the head that says what their parts must be.

A chunk is kept as one head and one or more parts, each the code of consecutive layers. The head carries everything
that decides whether the parts may be used: the layout's version, the identity of the model's keys and values, the
tokens, and size and checksum of every part. A head that is not exactly what its reader expects is damage, or belongs to
someone else; either way there is nothing to be had. Integers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import xxhash
from torch import Tensor

from cachestore.kv.codecs import CODECS, Damaged, Form

LAYOUT = 4
"""Grows whenever head, parts or a codec change; chunks of another version are never read."""
_MAGIC = b"HPKVHEAD"
_FIXED = struct.Struct("<8sHHHHII16s16s16s")
_PART = struct.Struct("<HHQ16s")
_CHECK = 16
_LEAST = 1 << 19
"""Bytes of keys and values that a part has at least: smaller reads cost more than they hide."""


_NOTE, _NOTE_TOKEN = 16, 4
"""Bytes of a note: so many, and so many for each token."""


class Foreign(ValueError):
    """An intact head of something else: another model, another version, other tokens of the same name."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything that one model's keys and values depend on but tokens."""

    fingerprint: str
    """Of the weights and whatever else shapes the numbers."""
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def identity(self) -> bytes:
        """Sixteen bytes that another model, dtype or version of the layout does not have."""
        parts = (LAYOUT, self.fingerprint, self.layers, self.kv_heads, self.head_dim, self.dtype)
        return blake2b(repr(parts).encode(), digest_size=16).digest()

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token, uncoded."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def forms(self, tokens: int) -> tuple[Form, ...]:
        """The parts that a chunk of so many tokens is kept in, first layers first."""
        layer = tokens * self.token_bytes // self.layers
        span = min(self.layers, max(1, -(-_LEAST // layer)))
        return tuple(
            Form(min(span, self.layers - first), tokens, self.kv_heads, self.head_dim, self.dtype, first)
            for first in range(0, self.layers, span)
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Which keys and values are meant: those of these tokens at positions 0, 1, …"""

    tokens: tuple[int, ...]
    tenant: str = ""
    """Who may use them; what is stored for one tenant does not exist for another."""
    variant: str = ""
    """Tells versions of the same tokens apart that were computed behind different text."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a chunk has at least one token")

    def name(self, geometry: Geometry) -> bytes:
        """Sixteen bytes; the same in every process."""
        state = blake2b(geometry.identity, digest_size=16)
        for text in (self.tenant, self.variant):
            part = text.encode("utf-8", "surrogateescape")
            state.update(struct.pack("<Q", len(part)))
            state.update(part)
        state.update(_packed(self.tokens))
        return state.digest()


@dataclass(frozen=True, slots=True)
class Part:
    """One code: what it was made of, how long it must be, and its checksum."""

    form: Form
    size: int
    check: bytes

    def verify(self, code: Tensor) -> None:
        """Raises Damaged unless these are the bytes that were written."""
        if len(code) != self.size or checksum(code) != self.check:
            raise Damaged(f"a part of {len(code)} bytes is not the one of {self.size} that was written")


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of a stored chunk."""

    codec: str
    parts: tuple[Part, ...]
    note: bytes
    """What whoever stored it wrote down, `note_size` bytes."""

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


def checksum(code: Tensor) -> bytes:
    """128 bits over uint8 [bytes] on a CPU; against accidents, not against forgers."""
    return xxhash.xxh3_128_digest(code.numpy().data)


def salt(tenant: str) -> str:
    """A tenant as part of a file name or key: short, and nothing that could be read back."""
    return blake2b(tenant.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Title:
    """What a head says of itself to someone who does not know whose it is."""

    name: bytes
    tokens: tuple[int, ...]
    note: bytes


def note_size(tokens: int) -> int:
    """Bytes of the note of any chunk of so many tokens; a shorter one is filled up with zeros."""
    return _NOTE + _NOTE_TOKEN * tokens


def head_size(geometry: Geometry, tokens: int) -> int:
    """Bytes of the head of any chunk of so many tokens."""
    return _FIXED.size + len(geometry.forms(tokens)) * _PART.size + note_size(tokens) + 4 * tokens + _CHECK


def write_head(geometry: Geometry, chunk: Chunk, codec: str, codes: Sequence[Tensor], note: bytes = b"") -> Tensor:
    """uint8 [head_size]; `codes` are the parts in order. Raises ValueError for a note that is too long."""
    forms, room = geometry.forms(len(chunk.tokens)), note_size(len(chunk.tokens))
    if len(note) > room:
        raise ValueError(f"a note of {len(note)} bytes, where {room} fit")
    fixed = _fixed(geometry, chunk, codec, len(forms))
    parts = (
        _PART.pack(form.first, form.layers, len(code), checksum(code)) for form, code in zip(forms, codes, strict=True)
    )
    body = b"".join((fixed, *parts, note.ljust(room, b"\0"), _packed(chunk.tokens)))
    return torch.frombuffer(bytearray(body + xxhash.xxh3_128_digest(body)), dtype=torch.uint8)


def read_head(geometry: Geometry, chunk: Chunk, data: Tensor) -> Head:
    """What `write_head` wrote for this chunk. Raises Damaged, or Foreign."""
    body = _intact(data)
    forms = geometry.forms(len(chunk.tokens))
    codec = _FIXED.unpack_from(body)[-1].rstrip(b"\0").decode("ascii", "replace")
    tokens = _packed(chunk.tokens)
    if (
        len(data) != head_size(geometry, len(chunk.tokens))
        or body[: _FIXED.size] != _fixed(geometry, chunk, codec, len(forms))
        or not body.endswith(tokens)
        or codec not in CODECS
    ):
        raise Foreign("an intact head of another model, version or chunk")
    behind = _FIXED.size + len(forms) * _PART.size
    table = body[_FIXED.size : behind]
    parts = tuple(
        Part(form, size, part_check)
        for form, (_, _, size, part_check) in zip(forms, _PART.iter_unpack(table), strict=True)
    )
    return Head(codec, parts, body[behind : len(body) - len(tokens)])


def read_title(geometry: Geometry, data: Tensor) -> Title:
    """What any head of this model's says. Raises Damaged, or Foreign."""
    body = _intact(data)
    magic, layout, *_, tokens, parts, identity, name, _ = _FIXED.unpack_from(body)
    if (
        (magic, layout, identity) != (_MAGIC, LAYOUT, geometry.identity)
        or not tokens
        or len(data) != head_size(geometry, tokens)
        or parts != len(geometry.forms(tokens))
    ):
        raise Foreign("an intact head of another model or version")
    end = len(body) - 4 * tokens
    return Title(name, struct.unpack_from(f"<{tokens}I", body, end), body[end - note_size(tokens) : end])


def _intact(data: Tensor) -> bytes:
    """A head without its checksum. Raises Damaged."""
    raw = data.numpy().tobytes()
    body, check = raw[:-_CHECK], raw[-_CHECK:]
    if len(raw) < _FIXED.size + _CHECK or xxhash.xxh3_128_digest(body) != check:
        raise Damaged(f"a head of {len(raw)} bytes is not what was written")
    return body


def _fixed(geometry: Geometry, chunk: Chunk, codec: str, parts: int) -> bytes:
    return _FIXED.pack(
        _MAGIC,
        LAYOUT,
        geometry.layers,
        geometry.kv_heads,
        geometry.head_dim,
        len(chunk.tokens),
        parts,
        geometry.identity,
        chunk.name(geometry),
        codec.encode("ascii", "replace")[:16],
    )


def _packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)
