"""The loops give what onnxruntime makes of the same files, whatever is asked together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.embedding.build import plain, read_safetensors
from gateway.embedding.encoder import DIM, Encoder, Tables, Unfit, constants_of
from gateway.embedding.local import find_model, load
from gateway.embedding.minilm import MiniLM, graph
from gateway.judge import model as judge
from gateway.judge.load import FOLDER, GRAPH
from gateway.judge.model import PairModel
from gateway.judge.words import word_table

PAIR_MODEL = FOLDER / GRAPH
TEXTS = (
    "How do I reset my password?",
    "What is the dose of ibuprofen for a child of 20 kg?",
    "hi",
    "",
    "Explain the difference between a process and a thread, with an example in C. " * 9,
    "Which of these 17 ports has the deepest harbour, and what may enter it at low tide?",
)


def opened(lanes: int | None = None, **changed: np.ndarray[Any, Any]) -> Encoder:
    """The pair model's encoder, with some constants changed. Raises Unfit."""
    constants = constants_of(PAIR_MODEL.read_bytes()) | changed
    words = word_table(find_model() / "model.safetensors")
    return Encoder(constants, Tables(words, constants["places"], marks=constants["mark"]), lanes)


def drawn(seed: int, lengths: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of texts, and marks."""
    chance = np.random.default_rng(seed)
    ids, marks = ([chance.integers(0, size, length).tolist() for length in lengths] for size in (30522, 10))
    return ids, marks


@pytest.fixture(scope="module", params=[16, 8])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    try:
        return opened(request.param)
    except Unfit as error:
        if "processor" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def minilm(cache: Path) -> MiniLM:
    return load(cache)[0]


def test_constants_are_read_as_the_library_reads_them() -> None:
    read = constants_of(PAIR_MODEL.read_bytes())
    known = onnx.load(PAIR_MODEL).graph.initializer
    assert list(read) == [item.name for item in known]
    for item in known:
        np.testing.assert_array_equal(read[item.name], onnx.numpy_helper.to_array(item), strict=True)


@settings(max_examples=60)
@given(st.data())
def test_damaged_models_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    node = onnx.helper.make_tensor("a", onnx.TensorProto.FLOAT, [2, 3], range(6))
    whole = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [node])).SerializeToString()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        constants_of(bytes(damaged))


def test_vectors_are_those_of_the_graph(minilm: MiniLM, cache: Path) -> None:
    (path,) = (cache / "cache").glob("*.onnx")
    tokens = [minilm._tokens(text)[0] for text in TEXTS]
    seen, wanted = minilm._run(tokens), np.concatenate([graph(str(path), threads=1)([ids]) for ids in tokens])
    # Rounding to bytes may fall either way where floats differ in their last place.
    assert (seen * wanted).sum(1).min() > 0.998


def test_logits_are_those_of_the_graph(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model()
    monkeypatch.setattr(judge, "Encoder", lambda constants, tables: encoder)
    model = PairModel(str(PAIR_MODEL), source / "model.safetensors", source / "tokenizer.json")
    plainly = judge.graph(str(PAIR_MODEL), word_table(source / "model.safetensors"), threads=1)
    tokens = [ids for text in TEXTS if (ids := model.tokens(text)) is not None]
    rows = [row for one in tokens for other in tokens if (row := model._row(one, other)) is not None]
    seen, wanted = np.array(model._run(rows)), np.array(plainly(rows))
    assert len(rows) == 25
    assert np.abs(seen - wanted).mean() < 0.1
    assert np.corrcoef(seen, wanted)[0, 1] > 0.998


def test_who_wants_several_threads_gets_onnxruntime() -> None:
    source = find_model()
    files = (str(PAIR_MODEL), source / "model.safetensors", source / "tokenizer.json")
    one, two = (PairModel(*files, threads=threads).logits(TEXTS[0], TEXTS[1:2]) for threads in (1, 2))
    assert one == pytest.approx(two, abs=0.3)


@settings(max_examples=25)
@given(lengths=st.lists(st.sampled_from([1, 2, 7, 15, 16, 17, 33, 64, 65, 130]), min_size=1, max_size=8))
def test_a_text_is_the_same_whatever_stands_beside_it(encoder: Encoder, lengths: list[int]) -> None:
    texts, marks = drawn(len(lengths), lengths)
    together, start = encoder.rows(texts, marks), 0
    for text, marked in zip(texts, marks, strict=True):
        alone = encoder.rows([text], [marked])
        np.testing.assert_array_equal(together[start : start + len(text)], alone)
        start += len(text)
    assert np.isfinite(together).all()


@pytest.mark.parametrize(
    ("texts", "marks", "message"),
    [
        ([], [], "texts of"),
        ([[5, 6], []], [[0, 0], []], "texts of"),
        ([[30522]], [[0]], "30522 words"),
        ([[-1]], [[0]], "30522 words"),
        ([[5] * 388], [[0] * 388], "387 places"),
        ([[5, 6]], [], "marks"),
        ([[5, 6]], [[0]], "marks"),
        ([[5], [6]], [[0], []], "marks below 10"),
        ([[5, 6]], [[0, 10]], "marks below 10"),
        ([[5], [6, 7]], [[0, 0], [0]], "marks"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    encoder: Encoder, texts: list[list[int]], marks: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.rows(texts, marks)


def test_tables_that_do_not_fit_are_refused() -> None:
    good = np.zeros((3, DIM), np.float32)
    wrong: tuple[dict[str, Any], ...] = (
        {"words": good.astype(np.float64)},
        {"words": good[:, ::-1]},
        {"words": good, "scales": np.ones(3, np.float32)},
        {"words": good.astype(np.int8), "scales": np.ones(2, np.float32)},
        {"places": good[:, :8]},
        {"marks": good[0]},
    )
    for tables in wrong:
        with pytest.raises(ValueError, match=r"words|scales|places|marks"):
            Tables(**({"words": good, "places": good} | tables))


def test_vectors_of_either_width_give_the_same() -> None:
    try:
        wide, narrow = opened(16), opened(8)
    except Unfit as error:
        pytest.skip(str(error))
    for seed in range(8):
        seen, other = (one.rows(*drawn(seed, [17, 23])) for one in (wide, narrow))
        # See above on rounding to bytes.
        assert np.corrcoef(seen.ravel(), other.ravel())[0, 1] > 0.998


def test_weights_that_overflow_are_left_to_onnxruntime(encoder: Encoder) -> None:
    weights = constants_of(PAIR_MODEL.read_bytes())["3.o.weight"].copy()
    weights[5, 7] = -65
    with pytest.raises(Unfit, match="64 at most"):
        opened(None, **{"3.o.weight": weights})


def test_another_graph_is_left_to_onnxruntime(encoder: Encoder) -> None:
    twin = plain(read_safetensors(find_model() / "model.safetensors")).SerializeToString()
    with pytest.raises(Unfit, match="not those of the graph"):
        Encoder(constants_of(twin), Tables(np.zeros((1, DIM), np.float32), np.zeros((1, DIM), np.float32)))


def test_means(encoder: Encoder) -> None:
    rows = np.random.default_rng(0).standard_normal((9, DIM), np.float32)
    wanted = np.stack([rows[:1].mean(0), rows[1:6].mean(0), rows[6:].mean(0)])
    np.testing.assert_allclose(encoder.means(rows, [1, 5, 3]), wanted, rtol=1e-5, atol=1e-6)
    lengths = np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.means(rows, [1, 5, 3], unit=True), wanted / lengths, rtol=1e-5, atol=1e-6)
    for counts in ([1, 5], [9, 0]):
        with pytest.raises(ValueError, match="parts"):
            encoder.means(rows, counts)


def test_dense(encoder: Encoder) -> None:
    chance = np.random.default_rng(0)
    x, weights = (chance.standard_normal((count, 96), np.float32) for count in (3, 16))
    bias = np.linspace(-9, 9, 16, dtype=np.float32)
    wanted = x @ weights.T + bias
    np.testing.assert_allclose(encoder.dense(x, weights, bias), wanted, rtol=1e-4, atol=1e-4)
    gated = [[value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in row] for row in wanted.tolist()]
    np.testing.assert_allclose(encoder.dense(x, weights, bias, gated=True), gated, rtol=1e-4, atol=1e-4)
    for wrong in ((weights[:, :64], bias), (weights, bias[:5])):
        with pytest.raises(ValueError, match="96 numbers"):
            encoder.dense(x, *wrong)
    with pytest.raises(ValueError, match="bias"):
        encoder.dense(x, weights[:5], bias[:5], gated=True)
