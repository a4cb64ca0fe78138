"""A model directory in the Hugging Face layout, checked before it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.config import ModelConfig, eos_ids, parse_config
from engine.errors import CheckpointError
from engine.model import Decoder, empty_weights, stored_tensors
from engine.tokenizer import ChatTokenizer, load_tokenizer, read_object

BUNDLED = Path(__file__).parent / "bundled"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE, _SAMPLES = 2**16, 256
"""Bytes of a sample of the weights, and how many are taken from a file."""
_FLOATS = {"F32", "F16", "BF16", "F64"}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the checkpoint's generation_config.json asks for where a request says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model with everything that is needed to answer."""

    name: str
    config: ModelConfig
    model: Decoder
    tokenizer: ChatTokenizer
    eos_ids: frozenset[int]
    defaults: SamplingDefaults
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    """Names these weights; another file, or another version of it, has another one."""


def load_checkpoint(directory: Path, *, name: str, device: str = "cpu", dtype: str = "auto") -> Checkpoint:
    """Load `directory`. Raises CheckpointError naming the file or field that is wrong."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    raw = read_object(directory / "config.json")
    if raw.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config: quantised checkpoints are not supported")
    config = parse_config(raw)
    tokenizer = load_tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has token id {tokenizer.size - 1}, but config.json: vocab_size is {config.vocab_size}"
        )
    generation = read_object(directory / "generation_config.json", optional=True)
    target = torch.device(device)
    precision = _dtype(dtype, config.dtype, target)
    ends = set(eos_ids(generation)) | set(config.eos_ids) | {i for i in (tokenizer.eos_id,) if i is not None}
    return Checkpoint(
        name=name,
        config=config,
        model=_load_model(config, directory, precision, target),
        tokenizer=tokenizer,
        eos_ids=frozenset(ends),
        defaults=_defaults(generation),
        dtype=precision,
        device=target,
        fingerprint=_fingerprint(directory),
    )


def _dtype(asked: str, saved: str, device: torch.device) -> torch.dtype:
    """`auto` is what the weights were saved as; on a CPU without instructions for half precision, float32."""
    if asked != "auto":
        return _DTYPES[asked]
    dtype = _DTYPES.get(saved, torch.float32)
    if device.type == "cpu" and dtype != torch.float32:
        return torch.bfloat16 if computes_bfloat16() else torch.float32
    return dtype


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself; emulating it is slower than float32."""
    cpu = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    least = int(generation.get("min_new_tokens") or 0)
    if generation.get("do_sample") is False:
        return SamplingDefaults(min_tokens=least)
    temperature, top_p, top_k = (generation.get(key) for key in ("temperature", "top_p", "top_k"))
    return SamplingDefaults(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=0 if top_k is None else int(top_k),
        min_tokens=least,
    )


def _load_model(config: ModelConfig, directory: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Every stored tensor is copied straight to its place on the device; one at a time is held beside it."""
    files = _locate(directory)
    _check({name: part.shape for name, part in stored_tensors(config)}, files)
    weights, views = empty_weights(config, dtype=dtype, device=device)
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a dict
                if (view := views.get(_plain(stored))) is not None:
                    view.copy_(tensors.get_tensor(stored))
    return Decoder(config, weights)


def _fingerprint(directory: Path) -> str:
    """A hash of config, sizes, and samples of the weights: to read all of them would take longer than to load them."""
    digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    for file in sorted(set(_locate(directory).values())):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for start in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def _locate(directory: Path) -> dict[str, Path]:
    """Stored tensor name to the file that holds it."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{index}: weight_map: expected an object of file names")
        return {tensor: directory / file for tensor, file in names.items()}
    if single.is_file():
        with _opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise CheckpointError(f"{directory}: only pickled weights; convert them to safetensors")
    raise CheckpointError(f"{single}: missing")


def _check(wanted: Mapping[str, tuple[int, ...]], files: Mapping[str, Path]) -> None:
    """Every parameter is there, with its shape, and nothing that the model would silently leave out."""
    stored = {_plain(name): name for name in files}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"weights: {missing[0]} is missing ({len(missing)} of {len(wanted)} are)")
    if surplus := sorted(name for name in stored.keys() - wanted.keys() if not _ignorable(name)):
        raise CheckpointError(f"weights: {surplus[0]} is not part of this architecture ({len(surplus)} such tensors)")
    for file in sorted(set(files.values())):
        with _opened(file) as tensors:
            present = set(tensors.keys())
            for name, shape in wanted.items():
                if files[stored[name]] == file:
                    _check_tensor(tensors, file, stored[name], shape, present)


def _check_tensor(tensors: Any, file: Path, stored: str, shape: tuple[int, ...], present: set[str]) -> None:
    if stored not in present:
        raise CheckpointError(f"{file}: {stored} is missing, though the index says it is here")
    part = tensors.get_slice(stored)
    if tuple(part.get_shape()) != shape:
        raise CheckpointError(f"{file}: {stored} has shape {tuple(part.get_shape())}, config.json asks for {shape}")
    if part.get_dtype() not in _FLOATS:
        raise CheckpointError(f"{file}: {stored} is stored as {part.get_dtype()}, which is not supported")


def _plain(stored: str) -> str:
    return stored.removeprefix("model.")


def _ignorable(name: str) -> bool:
    # Old checkpoints carry the rotary frequencies; tied ones sometimes carry the embedding a second time.
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _opened(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {error}") from error
