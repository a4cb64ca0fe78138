"""Turn the MiniLM weights into one int8 ONNX file: `python -m gateway.embedding.build MODEL_DIR OUT`.

Runs as a process of its own: it holds the float32 weights and `onnx`, which the gateway must not carry.

Why the graph is written by hand instead of quantised by a tool:

* Activations are quantised with scales measured once (`minilm_ranges.npz`), not per batch. So a text's vector does not
  depend on the texts it shares a batch with, and a pass over every activation is saved.
* A few channels are ten times larger than the rest. They are evened out before quantisation (SmoothQuant, Xiao et al.
  2023, section 4): free after a LayerNorm and inside attention, where the factor folds into weights; behind GELU it is
  one multiplication.
* Weights keep 7 bits, so that two products fit into the 16-bit sums of processors without VNNI.

The rows of all texts lie behind each other, so only attention knows where a text ends.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gateway.embedding.minilm import DIM, WINDOW, MiniLM

Floats = NDArray[np.float32]
Ranges = Mapping[str, Floats]
"""Activation name -> [2, channels], the smallest and largest value seen."""

LAYERS = 6
HEADS = 12
EPSILON = 1e-12
WEIGHT_MAX = 63
ACTIVATION_MAX = 255
BALANCE = 0.75
"""How much of a channel's excess moves from the activation into the weight (alpha of SmoothQuant)."""
GELU_CEILING = 4.0
"""Channels behind GELU that grow larger than this are scaled down to it."""
MIN_FIDELITY = 0.99
MICROSOFT = "com.microsoft"
RANGES_FILE = Path(__file__).with_name("minilm_ranges.npz")
PROBES = (
    "How do I reset my password?",
    "What is the dose of ibuprofen for a child of 20 kg?",
    "Write a Python function that sorts a list of dictionaries by a key, and explain its complexity.",
    "hello",
)


def read_safetensors(path: Path) -> dict[str, Floats]:
    """Read the float32 tensors of a file; others are left out. Raises ValueError when the file is damaged."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise ValueError(f"{path}: the header is longer than the file")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return {
        name: _tensor(memoryview(data)[8 + length :], entry)
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


def _tensor(body: memoryview, entry: dict[str, Any]) -> Floats:
    start, end = entry["data_offsets"]
    return np.frombuffer(body[start:end], np.float32).reshape(entry["shape"])


class Graph:
    """Nodes and constants as they are added; every method returns the name of what it computed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.watched: dict[str, str] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; a name may be given once."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        output: onnx.ValueInfoProto,
        watched: Iterable[str] = (),
    ) -> onnx.ModelProto:
        """Return the whole graph; `watched` names values that are put out beside the output."""
        outputs = [output, *(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in watched)]
        graph = helper.make_graph(self.nodes, "minilm", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@dataclass(frozen=True, slots=True)
class _Balance:
    """How an activation is evened out before it is quantised: `(value - middle) / even`, per channel."""

    even: Floats
    middle: Floats
    low: float
    high: float
    """Smallest and largest value that is left."""


def _balance(ranges: Ranges | None, key: str, weight: Floats, *, centred: bool) -> _Balance:
    """Share a channel's excess between activation and weight; without ranges nothing changes."""
    channels = weight.shape[1]
    if ranges is None:
        return _Balance(np.ones(channels, np.float32), np.zeros(channels, np.float32), 0.0, 0.0)
    low, high = ranges[key]
    middle = (low + high) / 2 if centred else np.zeros(channels, np.float32)
    reach = np.maximum(np.abs(low - middle), np.abs(high - middle)) + 1e-6
    even = reach**BALANCE / (np.abs(weight).max(0) + 1e-6) ** (1 - BALANCE)
    return _balanced(low, high, even / np.exp(np.log(even).mean()), middle)


def _ceiling(ranges: Ranges | None, key: str, channels: int) -> _Balance:
    """Behind GELU: only what is far above the rest is scaled down."""
    if ranges is None:
        return _Balance(np.ones(channels, np.float32), np.zeros(channels, np.float32), 0.0, 0.0)
    low, high = ranges[key]
    return _balanced(low, high, np.maximum(1.0, np.maximum(-low, high) / GELU_CEILING), np.zeros_like(low))


def _balanced(low: Floats, high: Floats, even: Floats, middle: Floats) -> _Balance:
    left, right = (low - middle) / even, (high - middle) / even
    return _Balance(
        even.astype(np.float32), middle.astype(np.float32), min(float(left.min()), 0.0), max(float(right.max()), 0.0)
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows out of a LayerNorm, balanced: the true value is `rows * scale + offset`, per channel."""

    rows: str
    scale: Floats
    offset: Floats
    balance: _Balance


class Encoder:
    """Writes the encoder into a graph: int8 with ranges, the plain float32 twin without."""

    def __init__(self, weights: Mapping[str, Floats], ranges: Ranges | None) -> None:
        self.weights = weights
        self.ranges = ranges
        self.graph = Graph()

    def write(self) -> str:
        """Write all of it; returns the name of the vectors, [texts, 1, DIM]."""
        rows = self.layers(self._embeddings())
        return self.graph.op("LpNormalization", self.graph.op("MatMul", "pool", rows), axis=-1, p=2)

    def layers(self, rows: str) -> str:
        """Write what follows the sum of the embeddings, [1, rows, DIM]; returns the last rows, [texts, tokens, DIM]."""
        self.graph.constant("flat", np.array([1, -1, DIM], np.int64))
        norm = "embeddings.LayerNorm"
        for layer in range(LAYERS):
            rows, norm = self._layer(layer, rows, norm)
        gain, shift = self.weights[f"{norm}.weight"], self.weights[f"{norm}.bias"]
        return self.graph.op("Reshape", self._layer_norm(norm, rows, gain, shift), "shape")

    def _embeddings(self) -> str:
        graph, words = self.graph, self.weights["embeddings.word_embeddings.weight"]
        places = self.weights["embeddings.position_embeddings.weight"][:WINDOW]
        places = places + self.weights["embeddings.token_type_embeddings.weight"][0]
        place = graph.op("Gather", graph.constant("places", places), "positions")
        if self.ranges is None:
            return graph.op("Add", graph.op("Gather", graph.constant("words", words), "ids"), place)
        small, scale = _round_rows(words, 127)  # a byte a value: 12 MB instead of 47
        word = graph.op("Cast", graph.op("Gather", graph.constant("words", small), "ids"), to=TensorProto.FLOAT)
        factor = graph.op("Gather", graph.constant("words.scale", scale[:, None]), "ids")
        return graph.op("Add", graph.op("Mul", word, factor), place)

    def _layer(self, layer: int, rows: str, norm: str) -> tuple[str, str]:
        """One layer, from before the LayerNorm that feeds it to before the one that feeds the next."""
        prefix = f"encoder.layer.{layer}"
        rows = self._attention(layer, rows, norm)
        rows = self._feed_forward(layer, rows, f"{prefix}.attention.output.LayerNorm")
        return rows, f"{prefix}.output.LayerNorm"

    def _attention(self, layer: int, rows: str, norm: str) -> str:
        prefix = f"encoder.layer.{layer}.attention"
        parts = [self._dense(f"{prefix}.self.{part}") for part in ("query", "key", "value")]
        weight = np.concatenate([part[0] for part in parts])
        bias = np.concatenate([part[1] for part in parts])
        entering = self._norm(rows, norm, f"{layer}.qkv", weight)
        weight, bias = weight * entering.scale, bias + weight @ entering.offset
        out, out_bias = self._dense(f"{prefix}.output.dense")
        balance = _balance(self.ranges, f"{layer}.o", out, centred=False)
        # The values' channels pass through attention unchanged: divided out before it, multiplied in after it.
        shrink = np.concatenate([np.ones(2 * DIM, np.float32), 1 / balance.even])
        seen = self._self_attention(f"{layer}.qkv", entering, weight * shrink[:, None], bias * shrink)
        seen = self.graph.op("Reshape", seen, "flat")
        branch = self._linear(f"{layer}.o", seen, balance, out * balance.even, out_bias + entering.offset)
        return self._residual(entering, branch)

    def _self_attention(self, key: str, entering: _Rows, weight: Floats, bias: Floats) -> str:
        graph = self.graph
        added = graph.constant(f"{key}.bias", bias)
        if self.ranges is None:
            graph.watched[key] = entering.rows
            rows = graph.op("Reshape", entering.rows, "shape")
            matrix = graph.constant(f"{key}.weight", weight.T)
            return graph.op("Attention", rows, matrix, added, "lengths", domain=MICROSOFT, num_heads=HEADS)
        small, scale, zero = self._quantise(key, entering.rows, entering.balance)
        matrix, matrix_scale, matrix_zero = self._matrix(key, weight)
        rows = graph.op("Reshape", small, "shape")
        inputs = (rows, matrix, added, scale, matrix_scale, "lengths", zero, matrix_zero)
        return graph.op("QAttention", *inputs, domain=MICROSOFT, num_heads=HEADS)

    def _feed_forward(self, layer: int, rows: str, norm: str) -> str:
        graph, prefix = self.graph, f"encoder.layer.{layer}"
        weight, bias = self._dense(f"{prefix}.intermediate.dense")
        entering = self._norm(rows, norm, f"{layer}.f1", weight)
        weight, bias = weight * entering.scale, bias + weight @ entering.offset
        hidden = self._linear(f"{layer}.f1", entering.rows, entering.balance, weight, bias)
        hidden = graph.op("Gelu", hidden, domain=MICROSOFT)
        out, out_bias = self._dense(f"{prefix}.output.dense")
        balance = _ceiling(self.ranges, f"{layer}.f2", out.shape[1])
        if self.ranges is not None:
            hidden = graph.op("Mul", hidden, graph.constant(f"{layer}.f2.even", 1 / balance.even))
        branch = self._linear(f"{layer}.f2", hidden, balance, out * balance.even, out_bias + entering.offset)
        return self._residual(entering, branch)

    def _dense(self, name: str) -> tuple[Floats, Floats]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _norm(self, rows: str, norm: str, key: str, weight: Floats) -> _Rows:
        """LayerNorm that balances its rows; its own gain and bias move into the weights behind it."""
        gain, bias = self.weights[f"{norm}.weight"], self.weights[f"{norm}.bias"]
        balance = _balance(self.ranges, key, weight * gain, centred=True)
        even, middle = balance.even, balance.middle
        name = self._layer_norm(norm, rows, np.reciprocal(even), -middle / even)
        return _Rows(name, even * gain, middle * gain + bias, balance)

    def _layer_norm(self, norm: str, rows: str, gain: Floats, shift: Floats) -> str:
        names = (self.graph.constant(f"{norm}.gain", gain), self.graph.constant(f"{norm}.shift", shift))
        return self.graph.op("LayerNormalization", rows, *names, axis=-1, epsilon=EPSILON)

    def _residual(self, entering: _Rows, branch: str) -> str:
        """Add a branch to what entered it; the entering offset is already in the branch's bias."""
        scale = self.graph.constant(f"{entering.rows}.scale", entering.scale)
        return self.graph.op("Add", branch, self.graph.op("Mul", entering.rows, scale))

    def _linear(self, key: str, rows: str, balance: _Balance, weight: Floats, bias: Floats) -> str:
        graph = self.graph
        added = graph.constant(f"{key}.bias", bias)
        if self.ranges is None:
            graph.watched[key] = rows
            return graph.op("Add", graph.op("MatMul", rows, graph.constant(f"{key}.weight", weight.T)), added)
        small, scale, zero = self._quantise(key, rows, balance)
        matrix, matrix_scale, matrix_zero = self._matrix(key, weight)
        inputs = (small, matrix, scale, matrix_scale, zero, matrix_zero, added)
        return graph.op("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)

    def _quantise(self, key: str, rows: str, balance: _Balance) -> tuple[str, str, str]:
        step = (balance.high - balance.low) / ACTIVATION_MAX
        scale = self.graph.constant(f"{key}.in.scale", np.array(step, np.float32))
        zero = self.graph.constant(f"{key}.in.zero", np.array(round(-balance.low / step), np.uint8))
        return self.graph.op("QuantizeLinear", rows, scale, zero), scale, zero

    def _matrix(self, key: str, weight: Floats) -> tuple[str, str, str]:
        small, scale = _round_rows(weight, WEIGHT_MAX)
        return (
            self.graph.constant(f"{key}.weight", small.T),
            self.graph.constant(f"{key}.scale", scale),
            self.graph.constant(f"{key}.zero", np.zeros(len(scale), np.int8)),
        )


def _round_rows(matrix: Floats, top: int) -> tuple[NDArray[np.int8], Floats]:
    """Round to -top..top with one scale a row."""
    scale = (np.abs(matrix).max(1) / top).astype(np.float32)
    scale[scale == 0] = 1.0
    return np.clip(np.rint(matrix / scale[:, None]), -top, top).astype(np.int8), scale


def quantised(weights: Mapping[str, Floats], ranges: Ranges) -> onnx.ModelProto:
    """The int8 graph that is shipped to the cache."""
    return _model(Encoder(weights, ranges))


def plain(weights: Mapping[str, Floats]) -> onnx.ModelProto:
    """The float32 twin, which the int8 graph is compared with."""
    return _model(Encoder(weights, None))


def watched(weights: Mapping[str, Floats]) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The float32 twin that also puts out every activation that is quantised in the other, and their names in order."""
    encoder = Encoder(weights, None)
    return _model(encoder, watch=True), tuple(encoder.graph.watched)


def _model(encoder: Encoder, *, watch: bool = False) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = [
        value("ids", TensorProto.INT64, [1, "rows"]),
        value("positions", TensorProto.INT64, [1, "rows"]),
        value("shape", TensorProto.INT64, [3]),
        value("lengths", TensorProto.INT32, ["texts"]),
        value("pool", TensorProto.FLOAT, ["texts", 1, "tokens"]),
    ]
    output = value(encoder.write(), TensorProto.FLOAT, ["texts", 1, DIM])
    return encoder.graph.model(inputs, output, encoder.graph.watched.values() if watch else ())


def load_ranges(path: Path = RANGES_FILE) -> dict[str, Floats]:
    """The measured ranges that ship with the package."""
    with np.load(path) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


def fidelity(tokenizer: Path, model: onnx.ModelProto, twin: onnx.ModelProto) -> float:
    """Smallest cosine between the vectors of two graphs over a few texts."""
    first, second = (MiniLM(graph.SerializeToString(), tokenizer).encode(PROBES) for graph in (model, twin))
    return min(float(a.vector @ b.vector) for a, b in zip(first, second, strict=True))


def main(arguments: list[str]) -> int:
    """Build, compare with the float32 twin on this processor, write."""
    source, target = (Path(argument) for argument in arguments)
    weights = read_safetensors(source / "model.safetensors")
    model = quantised(weights, load_ranges())
    reached = fidelity(source / "tokenizer.json", model, plain(weights))
    if reached < MIN_FIDELITY:
        print(f"the int8 model differs too much from float32 on this machine: cosine {reached:.4f}", file=sys.stderr)
        return 1
    target.write_bytes(model.SerializeToString())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
