"""Documents to rows and back: compression and checksums. No I/O."""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import zstandard

from cachestore.entry import Document, Hit, Vector


class RowDamaged(Exception):
    """A row's checksum does not match its content."""


_PAGE_SHARE = 160
"""Bytes of a row beside its payload: keys, names, numbers, the key's index, SQLite's own."""
_zstd = threading.local()


@dataclass(frozen=True, slots=True)
class Row:
    """A document as the log keeps it."""

    key: bytes
    scope: bytes
    namespace: str
    category: str
    model: str
    endpoint: str
    upstream: str
    created: float
    expires: float
    cost: float
    vector: bytes | None
    vector_sum: int
    packed: bool
    answer_sum: int
    text: str
    body: bytes

    @property
    def size(self) -> int:
        """Bytes on disk, near enough."""
        names = len(self.namespace) + len(self.category) + len(self.model) + len(self.upstream)
        return _PAGE_SHARE + names + len(self.vector or b"") + len(self.text.encode()) + len(self.body)


def encode(document: Document) -> Row:
    """Compress and sum up a document. Lone surrogates in its strings become question marks."""
    body = pack(document.body)
    packed = len(body) < len(document.body)
    stored = body if packed else document.body
    text = _clean(document.text)
    vector = None if document.vector is None else np.ascontiguousarray(document.vector, np.float32).tobytes()
    head = (document.key, document.scope, _clean(document.category), document.created, document.expires)
    names = (_clean(document.namespace), _clean(document.model), document.endpoint, _clean(document.upstream))
    return Row(
        key=document.key,
        scope=document.scope,
        namespace=names[0],
        category=head[2],
        model=names[1],
        endpoint=names[2],
        upstream=names[3],
        created=document.created,
        expires=document.expires,
        cost=document.cost,
        vector=vector,
        vector_sum=vector_sum(*head, vector),
        packed=packed,
        answer_sum=answer_sum(*head, names[2], names[3], packed, text, stored),
        text=text,
        body=stored,
    )


def vector_sum(key: bytes, scope: bytes, category: str, created: float, expires: float, vector: bytes | None) -> int:
    """What the index relies on: a vector in the wrong scope would be a leak, not a blemish."""
    return _sum(key, scope, category, created, expires, vector)


def answer_sum(
    key: bytes,
    scope: bytes,
    category: str,
    created: float,
    expires: float,
    endpoint: str,
    upstream: str,
    packed: bool,
    text: str,
    body: bytes,
) -> int:
    """What a hit relies on."""
    return _sum(key, scope, category, created, expires, endpoint, upstream, int(packed), text, body)


AnswerColumns = tuple[int, bytes, bytes, str, float, float, str, str, int, int, str, bytes, float]
ANSWER_COLUMNS = "id, key, scope, category, created, expires, endpoint, upstream, packed, answer_sum, text, body, cost"


def decode_answer(columns: AnswerColumns) -> Hit:
    """A stored answer from `ANSWER_COLUMNS`. Raises RowDamaged."""
    id_, key, scope, category, created, expires, endpoint, upstream, packed, expected, text, body, cost = columns
    try:
        found = answer_sum(key, scope, category, created, expires, endpoint, upstream, bool(packed), text, body)
        if found != expected:
            raise RowDamaged(f"entry {id_}: checksum {found:08x} instead of {expected:08x}")
        whole = unpack(body) if packed else body
        saved = float(cost)
    except (TypeError, AttributeError, ValueError, zstandard.ZstdError) as error:
        # A damaged record header can turn a column into another type.
        raise RowDamaged(f"entry {id_}: {error}") from error
    return Hit(id_, whole, created, expires, category, endpoint, upstream, text, saved)


def decode_vector(
    key: bytes, scope: bytes, category: str, created: float, expires: float, vector: bytes | None, expected: int
) -> Vector | None:
    """A stored vector, checked. Raises RowDamaged."""
    try:
        if vector_sum(key, scope, category, created, expires, vector) != expected:
            raise RowDamaged("checksum of the vector")
        return None if vector is None else np.frombuffer(vector, np.float32)
    except (TypeError, AttributeError, ValueError) as error:
        raise RowDamaged(str(error)) from error


def pack(body: bytes) -> bytes:
    """Compress; zstandard's objects are not to be shared between threads."""
    if not hasattr(_zstd, "compressor"):
        _zstd.compressor = zstandard.ZstdCompressor(level=3)
    packed: bytes = _zstd.compressor.compress(body)
    return packed


def unpack(body: bytes) -> bytes:
    """Undo `pack`. Raises zstandard.ZstdError."""
    if not hasattr(_zstd, "decompressor"):
        _zstd.decompressor = zstandard.ZstdDecompressor()
    whole: bytes = _zstd.decompressor.decompress(body)
    return whole


def _sum(*parts: bytes | str | float | int | None) -> int:
    """CRC-32 over parts, each with its length, so that no byte can move from one to the next unseen."""
    total = 0
    for part in parts:
        match part:
            case bytes():
                raw = part
            case str():
                raw = part.encode()
            case None:
                raw = b""
            case _:
                raw = struct.pack("<d", part)
        total = zlib.crc32(raw, zlib.crc32(len(raw).to_bytes(8, "little"), total))
    return total


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
