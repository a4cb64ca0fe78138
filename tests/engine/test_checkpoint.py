"""Every way a checkpoint can be broken ends in one error that names the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.__main__ import main
from engine.checkpoint import load_checkpoint
from engine.errors import CheckpointError
from tests.engine import checkpoints
from tests.engine.checkpoints import edit


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    checkpoints.write(directory, shard="60KB")
    return directory


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def setting(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "config.json", lambda config: config.update(changes))


def missing_shard(directory: Path) -> None:
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def truncated_shard(directory: Path) -> None:
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        shard = directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][NORM]
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)

    return apply


NORM = "model.norm.weight"


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.ones(7)


def wrong_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM] = torch.ones(48, dtype=torch.int8)


def left_out(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NORM]


def unknown_tensor(directory: Path) -> None:
    edit(directory / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.extra": "x.safetensors"}))


def unlisted_tensor(directory: Path) -> None:
    edit(directory / "model.safetensors.index.json", lambda index: index["weight_map"].pop(NORM))


def bad_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": []}')


def only_pickle(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")


def no_weights(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()


def writes(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_text(text))


def removes(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def void(_: object) -> None:
    """For lambdas whose value nobody wants."""


def scaled(**rope: Any) -> Callable[[Path], None]:
    return setting(rope_parameters={"rope_theta": 1e4, **rope})


BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (removes("config.json"), r"config\.json: missing"),
    "config is no JSON": (writes("config.json", "{"), r"config\.json: "),
    "config is a list": (writes("config.json", "[]"), r"config\.json: expected a JSON object, got list"),
    "unknown architecture": (setting(model_type="gpt2"), r"model_type: 'gpt2' is not a supported architecture"),
    "wrong size type": (setting(hidden_size="48"), r"hidden_size: expected a whole number"),
    "heads do not divide": (setting(num_key_value_heads=3), r"num_key_value_heads: 3 does not divide"),
    "odd head": (setting(head_dim=15), r"head_dim: 15 is odd"),
    "other activation": (setting(hidden_act="gelu"), r"hidden_act: 'gelu'"),
    "bad eps": (setting(rms_norm_eps=0), r"rms_norm_eps: expected a positive number"),
    "tie is text": (setting(tie_word_embeddings="yes"), r"tie_word_embeddings: expected true or false"),
    "bad eos": (setting(eos_token_id="</s>"), r"eos_token_id: "),
    "quantised": (setting(quantization_config={"bits": 4}), r"quantization_config"),
    "unknown rope": (scaled(rope_type="longrope"), r"rope_parameters\.rope_type: 'longrope'"),
    "rope without factor": (scaled(rope_type="linear"), r"rope_parameters\.factor"),
    "rope is text": (setting(rope_parameters="linear"), r"rope_parameters: expected an object"),
    "partial rotary": (scaled(partial_rotary_factor=0.5), r"partial_rotary_factor"),
    "missing shard": (missing_shard, r"model-00002-of-\d+\.safetensors: missing"),
    "truncated shard": (truncated_shard, r"model-00001-of-\d+\.safetensors: "),
    "wrong shape": (rewrite(wrong_shape), r"model\.norm\.weight has shape \(7,\), config\.json asks for \(48,\)"),
    "integers": (rewrite(wrong_type), r"model\.norm\.weight is stored as I8"),
    "tensor left out": (rewrite(left_out), r"model\.norm\.weight is missing, though the index says"),
    "tensor not listed": (unlisted_tensor, r"norm\.weight is missing \(1 of"),
    "tensor too many": (unknown_tensor, r"extra is not part of this architecture"),
    "bad index": (bad_index, r"weight_map: expected an object"),
    "only pickle": (only_pickle, r"only pickled weights"),
    "no weights": (no_weights, r"model\.safetensors: missing"),
    "no tokenizer": (removes("tokenizer.json"), r"tokenizer\.json: missing"),
    "broken tokenizer": (writes("tokenizer.json", '{"model": 3}'), r"tokenizer\.json: "),
    "broken template": (writes("chat_template.jinja", "{% if %}"), r"chat template, line 1"),
    "vocabulary too small": (setting(vocab_size=100), r"token id 257, but config\.json: vocab_size is 100"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_checkpoint_is_named(case: str, broken: Path) -> None:
    change, message = BREAKS[case]
    change(broken)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(broken, name="m")


def test_the_unbroken_copy_loads(broken: Path) -> None:
    assert load_checkpoint(broken, name="m").eos_ids == {257}


def test_generation_defaults_are_read(broken: Path) -> None:
    config = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "eos_token_id": [3, 257]}
    (broken / "generation_config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(broken, name="m")
    assert (loaded.defaults.temperature, loaded.defaults.top_p, loaded.defaults.top_k) == (0.5, 0.9, 20)
    assert loaded.eos_ids == {3, 257}


def test_the_command_refuses_a_broken_checkpoint(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing_shard(broken)
    assert main(["--model", str(broken), "--port", "0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("hitpath engine: ")
    assert "model-00002-of-" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "1"],
        ["--model", "bundled", "--port", "70000"],
        ["--model", "bundled", "--kv-memory", "many"],
        ["--model", "bundled", "--threads", "0"],
        ["--model", "bundled", "--device", "tpu"],
        ["--model", "bundled", "--port", "1", "--uds", "x"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: hitpath engine" in capsys.readouterr().err


def test_too_little_memory_for_any_answer_is_refused(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(broken), "--port", "0", "--kv-memory", "500"]) == 2
    assert "--kv-memory" in capsys.readouterr().err


def test_a_taken_address_fails_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path), "--uds", str(tmp_path / "no" / "such" / "folder")]) == 1
    assert "cannot listen on unix:" in capsys.readouterr().err
