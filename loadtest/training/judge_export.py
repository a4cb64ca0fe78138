"""From the trained net to the int8 graph that ships: the embedder's way of quantising (`gateway.embedding.build`).

The graph takes the rows of the word table as input, so the table itself ships with the embedder only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from gateway.embedding.build import MICROSOFT, Encoder, Floats, Ranges
from gateway.embedding.minilm import DIM
from gateway.judge.model import feeds
from gateway.judge.pairs import Row


def named(state: Mapping[str, Floats]) -> dict[str, Floats]:
    """The net's weights under the names that the encoder's writer knows."""
    names = {"embeddings.LayerNorm": "norm"}
    weights: dict[str, Floats] = {}
    for layer in range(6):
        prefix, ours = f"encoder.layer.{layer}", f"layers.{layer}"
        for kind in ("weight", "bias"):
            for part, value in zip(("query", "key", "value"), np.split(state[f"{ours}.qkv.{kind}"], 3), strict=True):
                weights[f"{prefix}.attention.self.{part}.{kind}"] = value
        names |= {
            f"{prefix}.attention.output.dense": f"{ours}.out",
            f"{prefix}.attention.output.LayerNorm": f"{ours}.norm",
            f"{prefix}.intermediate.dense": f"{ours}.up",
            f"{prefix}.output.dense": f"{ours}.down",
            f"{prefix}.output.LayerNorm": f"{ours}.last",
        }
    for name, own in names.items():
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = state[f"{own}.{kind}"]
    return weights


def quantised(state: Mapping[str, Floats], ranges: Ranges) -> onnx.ModelProto:
    """The int8 graph."""
    return _write(state, Encoder(named(state), ranges), watch=False)


def ranges(state: Mapping[str, Floats], pairs: Sequence[Row], words: Floats) -> dict[str, Floats]:
    """Smallest and largest value per channel of every activation that is quantised, [2, channels]."""
    encoder = Encoder(named(state), None)
    model = _write(state, encoder, watch=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, Floats] = {}
    for pair in pairs:
        _, *activations = session.run(None, feeds([pair], words))
        for name, activation in zip(encoder.graph.watched, activations, strict=True):
            rows = activation.reshape(-1, activation.shape[-1])
            low, high = rows.min(0), rows.max(0)
            if name in found:
                low, high = np.minimum(low, found[name][0]), np.maximum(high, found[name][1])
            found[name] = np.stack([low, high])
    return found


def _write(state: Mapping[str, Floats], encoder: Encoder, *, watch: bool) -> onnx.ModelProto:
    graph, value = encoder.graph, helper.make_tensor_value_info
    place = graph.op("Gather", graph.constant("places", state["places.weight"]), "positions")
    mark = graph.op("Gather", graph.constant("mark", state["marks.weight"]), "marks")
    rows = encoder.layers(graph.op("Add", graph.op("Add", "words", place), mark))
    pooled = graph.op("MatMul", "pool", rows)
    for number, name in enumerate(("first", "left", "right")):
        graph.constant(name, np.array([number], np.int64))
    first, left, right = (graph.op("Gather", pooled, name, axis=1) for name in ("first", "left", "right"))
    both = [first, graph.op("Abs", graph.op("Sub", left, right)), graph.op("Mul", left, right)]
    seen = graph.op("Flatten", graph.op("Concat", *both, axis=2), axis=1)
    for layer in ("units", "answer"):
        weight = graph.constant(f"{layer}.weight", state[f"{layer}.weight"])
        seen = graph.op("Gemm", seen, weight, graph.constant(f"{layer}.bias", state[f"{layer}.bias"]), transB=1)
        if layer == "units":
            seen = graph.op("Gelu", seen, domain=MICROSOFT)
    inputs = [
        value("words", TensorProto.FLOAT, [1, "rows", DIM]),
        value("marks", TensorProto.INT64, [1, "rows"]),
        value("positions", TensorProto.INT64, [1, "rows"]),
        value("shape", TensorProto.INT64, [3]),
        value("lengths", TensorProto.INT32, ["texts"]),
        value("pool", TensorProto.FLOAT, ["texts", 3, "tokens"]),
    ]
    output = value(seen, TensorProto.FLOAT, ["texts", 1])
    return graph.model(inputs, output, graph.watched.values() if watch else ())
