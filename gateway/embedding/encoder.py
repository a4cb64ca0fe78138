"""The int8 graphs of `build.py` and of the pair model without onnxruntime, on CPUs with AVX-512 VNNI or AVX2.

`encoder.c` has the loops. Half of onnxruntime's time for a question of a dozen tokens lies between its products. The
graph's file stays what is checked and shipped: its constants are read from there, and its nodes are known, since we
write them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIM = 384
LAYERS = 6
Floats = NDArray[np.float32]

_MOST = 64
"""Of an integer weight, by which sums of two products fit into 16 bits; AVX2 has no wider ones at first."""
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 7: np.int64}
"""ONNX's numbers of those that occur."""
_GRAPH, _CONSTANT = 7, 5
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9


class Unfit(Exception):
    """This graph cannot be run here; onnxruntime can."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What the first rows are made of. Raises ValueError where shapes or types do not fit."""

    words: NDArray[Any]
    """A row for each word, [vocabulary, DIM]: float32, or int8 with `scales`."""
    places: Floats
    """A row for each place in a text, [longest text, DIM]."""
    scales: Floats | None = None
    """One for each word."""
    marks: Floats | None = None
    """A row for each mark that a token may have, [marks, DIM]."""

    def __post_init__(self) -> None:
        numbers = np.float32 if self.scales is None else np.int8
        for name, table, kind in (
            ("words", self.words, numbers),
            ("places", self.places, np.float32),
            ("marks", self.marks, np.float32),
        ):
            if table is not None and (table.dtype != kind or table.shape[1:] != (DIM,) or not table.flags.c_contiguous):
                raise ValueError(f"{name}: {table.dtype} {table.shape}")
        if self.scales is not None and (self.scales.dtype != np.float32 or self.scales.size != len(self.words)):
            raise ValueError(f"scales: {self.scales.dtype} {self.scales.shape} for {len(self.words)} words")


class Encoder:
    """What the graph does between token ids and the last rows, and a few sums of those."""

    def __init__(self, constants: Mapping[str, NDArray[Any]], tables: Tables, lanes: int | None = None) -> None:
        """Lay out the weights; 11 MB. `lanes`: floats in a vector, 16 or 8; None: the most there are. Raises Unfit."""
        try:
            self._loops: Any = importlib.import_module("gateway.embedding._encoder")
        except ImportError as error:
            raise Unfit(f"it was not compiled at installation: {error}") from error
        most = self._loops.lanes()
        self._lanes = most if lanes is None else lanes
        if not most or self._lanes > most:
            raise Unfit(f"this processor has no {'AVX2' if not most else 'AVX-512 VNNI'}")
        self._tables = tables
        self._addresses = [_address(table) for table in (tables.words, tables.scales, tables.places, tables.marks)]
        try:
            self._kept = _laid_out(constants, self._lanes)
        except (KeyError, IndexError, ValueError) as error:
            raise Unfit(f"its constants are not those of the graph that is known: {error!r}") from error
        self._table = _address(self._kept[0])

    def rows(self, texts: Sequence[Sequence[int]], marks: Sequence[Sequence[int]] = ()) -> Floats:
        """Token ids of texts, and the mark of each where there are marks, to the last rows [sum of lengths, DIM].

        Raises ValueError where there is no such word, place or mark.
        """
        tables, lengths = self._tables, [len(text) for text in texts]
        longest = max(lengths, default=0)
        if min(lengths, default=0) < 1 or longest > len(tables.places) or not _within(texts, len(tables.words)):
            raise ValueError(f"texts of {lengths} tokens for {len(tables.words)} words and {len(tables.places)} places")
        if tables.marks is not None and not (lengths == [*map(len, marks)] and _within(marks, len(tables.marks))):
            raise ValueError(f"no marks below {len(tables.marks)} for texts of {lengths} tokens")
        ids, marked = (np.fromiter(chain.from_iterable(of), np.int64) for of in (texts, marks))
        sizes = np.array(lengths, np.int32)
        rows = np.empty((len(ids), DIM), np.float32)
        to, counts = _address(rows), _address(sizes)
        self._loops.gather(to, *self._addresses, _address(ids), _address(marked), counts, len(texts))
        self._loops.run(self._table, to, counts, len(texts), longest, self._lanes)
        return rows

    def means(self, rows: Floats, counts: Sequence[int], *, unit: bool = False) -> Floats:
        """Means of so many rows each, which stand one behind the other: [parts, DIM]; of length one if `unit`."""
        if sum(counts) != len(rows) or min(counts) < 1:
            raise ValueError(f"parts of {counts} rows for {len(rows)}")
        parts, out = np.array(counts, np.int32), np.empty((len(counts), DIM), np.float32)
        self._loops.means(_address(out), _address(rows), _address(parts), len(parts), unit)
        return out

    def dense(self, x: Floats, weights: Floats, bias: Floats, *, gated: bool = False) -> Floats:
        """x [N, D] times weights [F, D] transposed, and bias [F], as y · Φ(y) if `gated`.

        Raises ValueError where D is no multiple of 32 or, gated, F none of 16.
        """
        x, weights, bias = (np.ascontiguousarray(value, np.float32) for value in (x, weights, bias))
        width, depth = weights.shape
        if x.shape[1] != depth or bias.shape != (width,) or depth % 32 or (gated and width % 16):
            raise ValueError(f"rows of {x.shape[1]} numbers for weights {weights.shape} and a bias {bias.shape}")
        out = np.empty((len(x), width), np.float32)
        self._loops.dense(*map(_address, (out, x, weights, bias)), *out.shape, depth, gated, self._lanes)
        return out


def _address(values: NDArray[Any] | None) -> int:
    return 0 if values is None else values.ctypes.data


def _within(texts: Sequence[Sequence[int]], size: int) -> bool:
    return len(texts) > 0 and min(map(min, texts)) >= 0 and max(map(max, texts)) < size


def constants_of(model: bytes) -> dict[str, NDArray[Any]]:
    """The initialisers of an ONNX model, in their order; those of other types than occur are left out.

    Reads the wire format of protocol buffers itself: importing `onnx` takes longer than the gateway's start. Raises
    ValueError where that is damaged.
    """
    found: dict[str, NDArray[Any]] = {}
    for field, graph in _fields(memoryview(model)):
        for inner, body in _fields(graph) if field == _GRAPH else ():
            if inner == _CONSTANT:
                name, value = _tensor(body)
                if value is not None:
                    found[name] = value
    return found


def _tensor(body: memoryview) -> tuple[str, NDArray[Any] | None]:
    dims: list[int] = []
    kind, name, raw = 0, "", memoryview(b"")
    for field, value in _fields(body):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else _numbers(value)
        elif field == _TYPE:
            kind = value
        elif field in (_NAME, _RAW) and isinstance(value, int):
            raise ValueError(f"field {field} of a tensor is a number")
        elif field == _NAME:
            name = str(value, "utf-8")
        elif field == _RAW:
            raw = value
    return name, np.frombuffer(raw, _TYPES[kind]).reshape(dims) if kind in _TYPES else None


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or bytes."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        match key & 7:
            case 0:
                value, at = _number(data, at)
                yield key >> 3, value
            case 2:
                size, at = _number(data, at)
                if at + size > len(data):
                    raise ValueError("a field is longer than what it is in")
                yield key >> 3, data[at : at + size]
                at += size
            case 1:
                at += 8
            case 5:
                at += 4
            case wire:
                raise ValueError(f"fields of wire type {wire} are not known")


def _number(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number does not end")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _numbers(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _number(data, at)
        found.append(value)
    return found


def _laid_out(constants: Mapping[str, NDArray[Any]], lanes: int) -> list[NDArray[Any]]:
    """The table for `encoder.c`, and everything that it points to."""
    entered = [v for k, v in constants.items() if k.startswith("LayerNormalization_") and k.endswith(".scale")]
    kept: list[NDArray[Any]] = []
    floats: list[float] = []

    def at(value: NDArray[Any]) -> int:
        kept.append(np.ascontiguousarray(value))
        return kept[-1].ctypes.data

    def floats_at(name: str, size: int = DIM) -> int:
        return at(constants[name].astype(np.float32, copy=False).reshape(size))

    numbers: list[int] = []
    norm = "embeddings.LayerNorm"
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}"
        for half, (norms, products) in enumerate(
            ((norm, ("qkv", "o")), (f"{prefix}.attention.output.LayerNorm", ("f1", "f2")))
        ):
            numbers += (
                floats_at(f"{norms}.gain"),
                floats_at(f"{norms}.shift"),
                at(entered[2 * layer + half].reshape(DIM)),
            )
            for key in products:
                weights, scale, bias, into = _product(constants, f"{layer}.{key}", lanes)
                numbers += (at(weights), at(scale), at(bias))
                floats += into
        numbers.append(floats_at(f"{layer}.f2.even", 4 * DIM))
        norm = f"{prefix}.output.LayerNorm"
    last = (floats_at(f"{norm}.gain"), floats_at(f"{norm}.shift"))
    table = np.array([LAYERS, at(np.array(floats, np.float32)), *last, *numbers], np.int64)
    return [table, *kept]


def _product(
    constants: Mapping[str, NDArray[Any]], key: str, lanes: int
) -> tuple[NDArray[np.int8], Floats, Floats, list[float]]:
    """Weights as `encoder.c` reads them, scale and bias of its sums, and what makes a value an integer."""
    matrix, bias = constants[f"{key}.weight"], constants[f"{key}.bias"]
    step, zero = float(constants[f"{key}.in.scale"].item()), int(constants[f"{key}.in.zero"].item())
    if matrix.dtype != np.int8 or constants[f"{key}.zero"].any() or np.abs(matrix.astype(np.int16)).max() > _MOST:
        raise ValueError(f"{key} has no int8 weights around zero, of {_MOST} at most")
    depth, columns = matrix.shape
    weights = matrix.reshape(depth // 4, 4, columns // (2 * lanes), 2 * lanes).transpose(2, 0, 3, 1)
    scale = (constants[f"{key}.scale"] * step).astype(np.float32)
    # What the zero point adds to every sum is known beforehand.
    known = matrix.astype(np.int64).sum(0) * zero * scale.astype(np.float64)
    return weights, scale, (bias - known).astype(np.float32), [1 / step, zero]
