"""Decoding from fixed buffers gives what an ordinary step gives, whatever batch came before.

Where there is no GPU, recordings compute anew at every replay: the buffers, the padding and the scratch block are
under test, the kernels interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionBackend, KvPool, Packed
from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.config import ModelConfig, parse_config
from engine.executor import BLOCK_SIZE, Executor
from engine.graphs import DecodeGraphs, Recording, batch_sizes
from engine.model import Decoder, empty_weights
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.engine import checkpoints

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

SIZE, BLOCKS, CONTEXT = 8, 40, 64
SCRATCH = BLOCKS


def recompute(compute: Callable[[], Tensor]) -> Recording:
    """A graph for the CPU."""
    result = compute().clone()

    def replay() -> None:
        result.copy_(compute())

    return Recording(replay, result)


RECORD = None if DEVICE == "cuda" else recompute


def model(**settings: object) -> Decoder:
    """Llama's layout with random weights."""
    config = parse_config(
        {
            "model_type": "llama",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            **settings,
        }
    )
    torch.manual_seed(0)
    weights, views = empty_weights(config, dtype=torch.float32, device=torch.device(DEVICE))
    for view in views.values():
        torch.nn.init.normal_(view, std=0.2)
    return Decoder(config, weights)


def pool(config: ModelConfig) -> KvPool:
    memory = KvPool(
        layers=config.layers,
        blocks=BLOCKS + 1,
        block_size=SIZE,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device(DEVICE),
    )
    for layer in memory.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return memory


def triton(config: ModelConfig) -> AttentionBackend:
    module = pytest.importorskip("engine.attention.triton", reason="triton is not installed", exc_type=ImportError)
    backend: AttentionBackend = module.TritonBackend(
        heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, dtype=torch.float32, device=DEVICE
    )
    return backend


def decoding(totals: list[int], *, stretching: bool = False) -> Packed:
    """One new token each; sequence i has every len(totals)-th block from i on."""
    count = len(totals)
    width = -(-max(totals) // SIZE)
    tables = torch.arange(count)[:, None] + count * torch.arange(width)[None]
    positions = torch.tensor(totals) - 1
    slots = tables[torch.arange(count), positions // SIZE] * SIZE + positions % SIZE
    return Packed(
        ids=(torch.arange(count) * 7 % 50).to(DEVICE),
        positions=positions.to(DEVICE),
        slots=slots.to(DEVICE),
        tables=tables.to(DEVICE, torch.int32),
        starts=torch.arange(count + 1, dtype=torch.int32).to(DEVICE),
        lengths=torch.tensor(totals, dtype=torch.int32).to(DEVICE),
        counts=(1,) * count,
        totals=tuple(totals),
        drawing=torch.arange(count).to(DEVICE),
        spans=torch.tensor(totals).to(DEVICE) if stretching else None,
    )


@pytest.mark.parametrize("stretching", [False, True])
def test_replays_give_what_steps_give(stretching: bool) -> None:
    rope = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}} if stretching else {}
    decoder = model(max_position_embeddings=CONTEXT // 2 if stretching else CONTEXT, **rope)
    backend, memory = triton(decoder.config), pool(decoder.config)
    graphs = DecodeGraphs(decoder, memory, backend, context=CONTEXT, most=5, scratch=SCRATCH, record=RECORD)
    # Long rows first: what they leave in the buffers must not reach the shorter ones after them.
    for totals in ([60, 64, 33], [3], [17, 1, 40, 9, 24], [5, 5], [64, 2, 2, 2]):
        packed = decoding(totals, stretching=stretching)
        assert graphs.fits(packed)
        seen = graphs.scores(packed).clone()
        before = [layer.keys.clone() for layer in memory.layers]
        expected = decoder.logits(decoder.forward(packed, memory, SdpaBackend()))
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        # The ordinary step wrote what the replay had written, and the replay nothing else but scratch.
        for layer, written in zip(memory.layers, before, strict=True):
            torch.testing.assert_close(layer.keys[:SCRATCH], written[:SCRATCH], rtol=1e-5, atol=1e-5)


def test_only_the_scratch_block_is_written_beside_the_step() -> None:
    decoder = model()
    memory = pool(decoder.config)
    clean = [layer.keys.clone() for layer in memory.layers]
    graphs = DecodeGraphs(
        decoder, memory, triton(decoder.config), context=CONTEXT, most=4, scratch=SCRATCH, record=RECORD
    )
    packed = decoding([9, 20, 30])
    graphs.scores(packed)
    for layer, before in zip(memory.layers, clean, strict=True):
        changed = (layer.keys != before).flatten(0, 1).any(dim=-1).any(dim=-1).nonzero().flatten().tolist()
        assert set(packed.slots.tolist()) <= set(changed) <= {*packed.slots.tolist(), SCRATCH * SIZE}


def test_what_does_not_fit() -> None:
    decoder = model()
    graphs = DecodeGraphs(
        decoder, pool(decoder.config), triton(decoder.config), context=16, most=2, scratch=SCRATCH, record=RECORD
    )
    assert graphs.fits(decoding([16, 3]))
    assert not graphs.fits(decoding([3, 3, 3])), "more sequences than were captured"
    assert not graphs.fits(decoding([17])), "longer than the context"


def test_the_plain_backend_is_refused() -> None:
    decoder = model()
    with pytest.raises(ValueError, match="'sdpa' cannot be captured"):
        DecodeGraphs(decoder, pool(decoder.config), SdpaBackend(), context=16, most=2, scratch=SCRATCH, record=RECORD)


def test_batch_sizes() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(5) == (1, 2, 4, 5)
    assert batch_sizes(64) == (1, 2, 4, 8, 16, 32, 48, 64)


def test_captured_answers_are_those_of_ordinary_steps(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, "qwen3")
    checkpoint = load_checkpoint(tmp_path, name="m", device=DEVICE, dtype="float32")
    plain, captured = generate(checkpoint, None), generate(checkpoint, 4)
    assert captured == plain
    assert all(len(tokens) == 8 for tokens in plain)


@torch.inference_mode()
def generate(checkpoint: Checkpoint, capture: int | None) -> list[list[int]]:
    """Greedy answers to four prompts, so that prompts, mixed steps and decoding at several sizes occur."""
    books = BlockManager(BLOCKS, BLOCK_SIZE, root=b"test")
    scheduler = Scheduler(books, max_running=4, max_waiting=9, token_budget=12, patience=1000.0)
    executor = Executor(checkpoint, triton(checkpoint.config), blocks=BLOCKS, context=128)
    if capture is not None:
        executor.capture(capture, RECORD)
    params = SamplingParams(max_tokens=8)
    rows = [Sequence([seed * 7 + i for i in range(3 + 5 * seed)], params) for seed in range(4)]
    scheduler.add(rows, 0.0)
    while (step := scheduler.schedule(0.0)) is not None:
        executor.copy(step.copies)
        scores = executor.run(step.chunks).scores
        drawing = [chunk.sequence for chunk in step.chunks if chunk.draws]
        scheduler.complete(step, dict(zip(drawing, scores.argmax(-1).tolist(), strict=True)))
        for row in drawing:
            if row.drawn == params.max_tokens:
                scheduler.finish(row)
                executor.forget(row)
    return [row.tokens[len(row.prompt) :] for row in rows]
