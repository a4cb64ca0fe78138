"""The engine on a GPU: random weights of real shapes, against what the same machine's memory and matrix units can do.

Every part runs in a process of its own with a limit of its own, the most important first, and writes what it found
at once: a part that fails, hangs or poisons the device takes nothing else with it. See `gpu.sh`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.nn import functional

from engine.attention import AttentionBackend, LayerPool, Packed
from engine.attention.choose import choose, choose_ops
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint, SamplingDefaults
from engine.config import ModelConfig, parse_config
from engine.executor import BLOCK_SIZE, Executor
from engine.graphs import CAPTURABLE
from engine.model import Decoder, empty_weights
from engine.ops import PlainOps
from engine.runner import Failed, Finished, Happened, Job, Progress, Runner
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler
from engine.settings import Attention
from engine.tokenizer import ChatTokenizer
from loadtest.table import Bar, Row, render

LLAMA, QWEN, TINY = "llama-3.1-8b", "qwen2.5-1.5b", "tiny"
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        LLAMA: {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        QWEN: {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        TINY: {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    prompt: int = 8192
    answer: int = 256
    concurrent: int = 64
    concurrent_prompt: int = 256
    rounds: int = 3
    room: int = 65_536
    """Tokens of keys and values."""
    copy: int = 2**32
    """Bytes."""
    product: int = 8192
    """Rows and columns."""


SMALL = Sizes(prompt=320, answer=8, concurrent=4, concurrent_prompt=32, rounds=2, room=2048, copy=2**22, product=256)


class Sink:
    """Where a part puts what it found: rows of the table, and anything worth knowing beside them."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part

    def row(self, row: Row) -> None:
        """A figure."""
        self._write("row", asdict(row) | {"bar": None if row.bar is None else asdict(row.bar)})

    def note(self, **facts: Any) -> None:
        """Facts, for the JSON."""
        self._write("note", facts)

    def _write(self, kind: str, content: Any) -> None:
        line = json.dumps({"part": self._part, kind: content}, default=str)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


@dataclass(frozen=True, slots=True)
class Setting:
    """Common to all parts."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    out: Path
    rates: Mapping[str, float]
    """Found by `machine`: `copy` in bytes a second, `product` in operations a second."""
    tiny: bool

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """For the device to have done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int) -> float:
        """Median of a call's time on the device, after two calls that do not count."""
        taken = []
        for _ in range(repeats + 2):
            self.wait()
            began = time.perf_counter()
            action()
            self.wait()
            taken.append(time.perf_counter() - began)
        return median(taken[2:])


# --- the machine ----------------------------------------------------------------------------------------------------


def machine(setting: Setting, sink: Sink) -> None:
    """What is here, and what its memory and matrix units can do."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "numpy"):
        try:
            facts[name] = __import__(name).__version__
        except ImportError as error:
            facts[name] = str(error)
    if setting.cuda:
        card = torch.cuda.get_device_properties(setting.device)
        facts |= {"gpu": card.name, "memory": card.total_memory, "processors": card.multi_processor_count}
        facts["cuda"] = torch.version.cuda
    sink.note(**facts)
    copy = _copy_rate(setting)
    sink.note(rate="copy", value=copy)
    sink.row(Row("copy within memory, read and written", copy / 1e9, "GB/s"))
    product = _product_rate(setting)
    sink.note(rate="product", value=product)
    sink.row(Row(f"matrix product of {setting.sizes.product} in {setting.dtype}", product / 1e12, "TFLOP/s"))


def _copy_rate(setting: Setting) -> float:
    """Bytes a second, those read and those written."""
    source = torch.empty(setting.sizes.copy, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    return 2 * len(source) / setting.seconds(lambda: target.copy_(source), 10)


def _product_rate(setting: Setting) -> float:
    """Operations a second of a matrix product."""
    size = setting.sizes.product
    a, b = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))
    # Many in a row, as in a model: a single one ends before the clocks have settled.
    return 10 * 2 * size**3 / setting.seconds(lambda: [a @ b for _ in range(10)], 5)


# --- the engine -----------------------------------------------------------------------------------------------------


def random_checkpoint(shape: str, setting: Setting) -> Checkpoint:
    """Random weights made on the device, and a tokenizer with as many tokens."""
    config = parse_config(SHAPES[shape])
    weights, views = empty_weights(config, dtype=setting.dtype, device=setting.device)
    for name, view in views.items():
        if "norm" in name:
            view.fill_(1.0)
        else:
            view.normal_(std=0.02)
    vocabulary = {f"Ġw{index}": index for index in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="Ġw0"))
    tokenizer.decoder = decoders.ByteLevel()
    return Checkpoint(
        name=shape,
        config=config,
        model=Decoder(config, weights),
        tokenizer=ChatTokenizer(tokenizer, {}, None),
        eos_ids=frozenset(),
        defaults=SamplingDefaults(),
        dtype=setting.dtype,
        device=setting.device,
        fingerprint=shape,
    )


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that a decoding step must read: all but the embedding, of which it reads a row."""
    weights = checkpoint.model.weights
    tensors = [weights.norm, weights.head]
    for layer in weights.layers:
        tensors += [tensor for name in layer.__slots__ if (tensor := getattr(layer, name)) is not None]
    return sum(tensor.nbytes for tensor in tensors)


def prefill_operations(config: ModelConfig, tokens: int) -> float:
    """Multiplications and additions of a prompt: the layers' products, causal attention, and one row of scores."""
    d, hidden = config.head_dim, config.hidden_size
    projections = hidden * d * (2 * config.heads + 2 * config.kv_heads) + 3 * hidden * config.intermediate_size
    attention = 4 * config.heads * d * tokens * (tokens + 1) / 2
    return config.layers * (2.0 * projections * tokens + attention) + 2.0 * hidden * config.vocab_size


class Serving:
    """Scheduler, executor and worker, without HTTP."""

    def __init__(self, checkpoint: Checkpoint, setting: Setting, sink: Sink) -> None:
        sizes, config = setting.sizes, checkpoint.config
        blocks = sizes.room // BLOCK_SIZE
        began = time.perf_counter()
        backend = choose(config, block_size=BLOCK_SIZE, dtype=setting.dtype, device=setting.device)
        checkpoint.model.ops = choose_ops(config, dtype=setting.dtype, device=setting.device, products=PlainOps())
        context = min(config.context, sizes.room, 4 * sizes.prompt)
        self.executor = Executor(checkpoint, backend, blocks=blocks, context=context)
        proven = time.perf_counter()
        if setting.cuda and backend.name in CAPTURABLE:
            self.executor.capture(sizes.concurrent)
        sink.note(
            attention=backend.name,
            ops=type(checkpoint.model.ops).__name__,
            choosing_s=proven - began,
            capturing_s=time.perf_counter() - proven,
        )
        self.books = BlockManager(blocks, BLOCK_SIZE, root=b"gpu")
        budget = max(8192, sizes.prompt)
        scheduler = Scheduler(
            self.books, max_running=sizes.concurrent, max_waiting=1024, token_budget=budget, patience=600
        )
        self._happened: list[tuple[float, Happened]] = []
        self._runner = Runner(checkpoint, scheduler, self.executor, deliver=self._deliver)
        self._runner.start()

    def _deliver(self, happened: Happened) -> None:
        self._happened.append((time.perf_counter(), happened))

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[float]]:
        """When all were asked for, and the time of every token drawn. Raises RuntimeError when one fails."""
        self._happened = []
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        jobs = [Job(prompt, params, lambda event: None) for prompt in prompts]
        began = time.perf_counter()
        self._runner.submit(jobs)
        over, stamps, at = 0, list[float](), 0
        while over < len(jobs):
            if at == len(self._happened):
                time.sleep(0.0002)
                continue
            now, happened = self._happened[at]
            at += 1
            for _, event in happened:
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                over += isinstance(event, Finished)
                stamps += [now] * isinstance(event, Progress)
        return began, stamps

    def close(self) -> None:
        """End the worker."""
        self._runner.close()


def prompt_of(length: int, config: ModelConfig, seed: int) -> list[int]:
    """Random tokens, so that no two prompts share a prefix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


def serve(shape: str, setting: Setting, sink: Sink) -> None:
    """Decode one, prefill, decode many, start from a known prefix; at last where the time goes."""
    checkpoint = random_checkpoint(shape, setting)
    serving = Serving(checkpoint, setting, sink)
    with torch.inference_mode(), closing(serving):
        serving.answer([prompt_of(64, checkpoint.config, 1)], 8)
        for measure in (decode_one, prefill, decode_many, known_prefix):
            try:
                measure(shape, checkpoint.config, weight_bytes(checkpoint), serving, setting, sink)
            except Exception:  # the other figures are still wanted
                sink.note(failed=f"{shape} {measure.__name__}", error=traceback.format_exc())
        if setting.cuda:
            profile(shape, checkpoint.config, serving, setting, sink)


@contextmanager
def closing(serving: Serving) -> Iterator[None]:
    """End the worker whatever happens."""
    try:
        yield
    finally:
        serving.close()


def decode_one(shape: str, config: ModelConfig, weights: int, serving: Serving, setting: Setting, sink: Sink) -> None:
    """Tokens a second of a single answer, beside what reading all weights for each would allow."""
    rates = []
    for seed in range(setting.sizes.rounds):
        _, stamps = serving.answer([prompt_of(128, config, 100 + seed)], setting.sizes.answer)
        rates.append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
    limit = setting.rates["copy"] / weights
    sink.row(
        compared(f"{shape}: decoding, batch 1", "token/s", rates, limit, "weights at copy speed", Bar(">=", 0.60, "x"))
    )


def prefill(shape: str, config: ModelConfig, weights: int, serving: Serving, setting: Setting, sink: Sink) -> None:
    """Operations a second until the first token of a long prompt, beside a plain matrix product's."""
    length, rates = setting.sizes.prompt, []
    for seed in range(setting.sizes.rounds + 1):
        began, stamps = serving.answer([prompt_of(length, config, 200 + seed)], 1)
        rates.append(prefill_operations(config, length) / (stamps[0] - began) / 1e12)
    limit, bar = setting.rates["product"] / 1e12, Bar(">=", 0.45, "x")
    sink.row(compared(f"{shape}: prompt of {length}", "TFLOP/s", rates[1:], limit, "matrix product", bar))


def decode_many(shape: str, config: ModelConfig, weights: int, serving: Serving, setting: Setting, sink: Sink) -> None:
    """Tokens a second of many answers, from asking to the last token."""
    sizes, rates = setting.sizes, []
    for round_ in range(sizes.rounds):
        prompts = many_prompts(sizes, config, 1000 * (round_ + 1))
        began, stamps = serving.answer(prompts, sizes.answer)
        rates.append(len(stamps) / (stamps[-1] - began))
    sink.note(concurrent=shape, ours=median(rates))
    sink.row(Row(f"{shape}: {sizes.concurrent} concurrent", median(rates), "token/s", low=min(rates), high=max(rates)))


def known_prefix(shape: str, config: ModelConfig, weights: int, serving: Serving, setting: Setting, sink: Sink) -> None:
    """Seconds to the first token of a prompt whose first 90 % are known, beside one of which nothing is."""
    length, cold, warm = setting.sizes.prompt, [], []
    for seed in range(setting.sizes.rounds):
        prompt = prompt_of(length, config, 300 + seed)
        began, stamps = serving.answer([prompt], 1)
        cold.append(stamps[0] - began)
        known = length * 9 // 10
        began, stamps = serving.answer([prompt[:known] + prompt_of(length - known, config, 400 + seed)], 1)
        warm.append(stamps[0] - began)
    bar = Bar("<=", 0.15, "x")
    name = f"{shape}: first token of {length}, 90 % known"
    sink.row(compared(name, "ms", [1e3 * s for s in warm], median(cold) * 1e3, "nothing known", bar))


def many_prompts(sizes: Sizes, config: ModelConfig, seed: int) -> list[list[int]]:
    """For as many answers at a time as are measured."""
    return [prompt_of(sizes.concurrent_prompt, config, seed + index) for index in range(sizes.concurrent)]


def compared(name: str, unit: str, measured: Sequence[float], ceiling: float, ceiling_name: str, bar: Bar) -> Row:
    """Judged by the share of one ceiling."""
    shares = [value / ceiling for value in measured]
    return Row(name, median(measured), unit, ceiling, ceiling_name, median(shares), "x", min(shares), max(shares), bar)


def profile(shape: str, config: ModelConfig, serving: Serving, setting: Setting, sink: Sink) -> None:
    """Which kernels the time goes to, for whoever looks for more; a file each."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    work = {"decode": ([prompt_of(128, config, 7)], 24), "prefill": ([prompt_of(setting.sizes.prompt, config, 8)], 1)}
    for name, (prompts, tokens) in work.items():
        try:
            with recording(activities=[ProfilerActivity.CUDA]) as seen:
                serving.answer(prompts, tokens)
                setting.wait()
            table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)
            (setting.out / f"profile-{shape}-{name}.txt").write_text(table)
        except Exception as error:  # figures do not depend on it
            sink.note(failed=f"profile {name}", error=repr(error))


# --- attention alone ------------------------------------------------------------------------------------------------


def attention(setting: Setting, sink: Sink) -> None:
    """Every backend on Llama's heads: a long prompt, one long and many short decodes; then other tiles for Triton."""
    from engine.attention.triton import TritonBackend, Tuning

    config = parse_config(SHAPES[TINY if setting.tiny else LLAMA])
    length = setting.sizes.prompt
    names: tuple[Attention, ...] = ("triton", "varlen", "sdpa")
    for name in names:
        try:
            backend = choose(config, block_size=BLOCK_SIZE, wanted=name, dtype=setting.dtype, device=setting.device)
            _attention_figures(name, backend, config, setting, sink)
        except Exception as error:  # that it cannot is what is found
            sink.note(failed=f"attention {name}", error=repr(error))
    q, k, v = (
        torch.randn(1, heads, length, config.head_dim, device=setting.device).to(setting.dtype)
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    )
    taken = setting.seconds(
        lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 5
    )
    operations = 2 * config.heads * config.head_dim * length * (length + 1)
    sink.row(Row(f"attention, prompt of {length}: torch without blocks", operations / taken / 1e12, "TFLOP/s"))
    if not setting.cuda:
        return
    for tuned in (
        Tuning(128, 64, 8, 3),
        Tuning(128, 128, 8, 3),
        Tuning(64, 64, 4, 5),
        Tuning(128, 32, 8, 5),
        Tuning(128, 64, 4, 3),
    ):
        try:
            backend = TritonBackend(
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                dtype=setting.dtype,
                device=setting.device,
                tuned=tuned,
            )
            _attention_figures(f"triton {tuned}", backend, config, setting, sink)
        except Exception as error:
            sink.note(failed=f"attention {tuned}", error=repr(error))


def _attention_figures(name: str, backend: AttentionBackend, config: ModelConfig, setting: Setting, sink: Sink) -> None:
    length = setting.sizes.prompt
    operations = 2 * config.heads * config.head_dim * length * (length + 1)
    taken = setting.seconds(_attending(backend, config, [(0, length)], setting), 5)
    sink.row(Row(f"attention, prompt of {length}: {name}", operations / taken / 1e12, "TFLOP/s"))
    for batch, keys in ((1, 4 * length), (setting.sizes.concurrent, length // 4)):
        moved = 2 * batch * keys * config.kv_heads * config.head_dim * setting.dtype.itemsize
        taken = setting.seconds(_attending(backend, config, [(keys - 1, 1)] * batch, setting), 20)
        sink.row(Row(f"attention, {batch} decoding over {keys}: {name}", moved / taken / 1e9, "GB/s"))


def _attending(
    backend: AttentionBackend, config: ModelConfig, mix: list[tuple[int, int]], setting: Setting
) -> Callable[[], Tensor]:
    """One layer's attention over random keys, for sequences of (tokens before, new tokens)."""
    counts, totals = tuple(count for _, count in mix), tuple(before + count for before, count in mix)
    width = -(-max(totals) // BLOCK_SIZE)
    tables = torch.randperm(len(mix) * width).view(len(mix), width)
    positions = torch.cat([torch.arange(before, before + count) for before, count in mix])
    owners = torch.repeat_interleave(torch.arange(len(mix)), torch.tensor(counts))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=setting.device).to(setting.dtype)

    pool = LayerPool(*(random(len(mix) * width, BLOCK_SIZE, config.kv_heads, config.head_dim) for _ in range(2)))
    queries = random(len(positions), config.heads, config.head_dim)
    fresh = (random(len(positions), config.kv_heads, config.head_dim),) * 2
    starts = torch.tensor([0, *counts]).cumsum(0)
    packed = Packed(
        ids=torch.zeros_like(positions).to(setting.device),
        positions=positions.to(setting.device),
        slots=(tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).to(setting.device),
        tables=tables.to(setting.device, torch.int32),
        starts=starts.to(setting.device, torch.int32),
        lengths=torch.tensor(totals, dtype=torch.int32, device=setting.device),
        counts=counts,
        totals=totals,
        drawing=(starts[1:] - 1).to(setting.device),
    )
    plan = backend.plan(packed, None, BLOCK_SIZE)
    return lambda: backend.attend(queries, pool, plan, fresh)


# --- the reference --------------------------------------------------------------------------------------------------


def reference(shape: str, setting: Setting, sink: Sink) -> None:
    """transformers' continuous batching with the same sizes and prompts."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    described = dict(SHAPES[shape])
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    torch.set_default_dtype(setting.dtype)
    with setting.device:
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    sizes = setting.sizes
    wanted = GenerationConfig(max_new_tokens=sizes.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # On a GPU it chooses everything itself; on a CPU it would take most of the memory.
    options: dict[str, Any] = {} if setting.cuda else {"continuous_batching_config": _modest(sizes), "warmup": False}
    rates = []
    for round_ in range(2):
        prompts = many_prompts(sizes, parse_config(SHAPES[shape]), 1000 * (round_ + 1))
        began = time.perf_counter()
        made = model.generate_batch(inputs=prompts, generation_config=wanted, progress_bar=False, **options)
        answers = list(made.values())
        wall = time.perf_counter() - began
        drawn = sum(len(answer.generated_tokens) for answer in answers)
        if drawn != sizes.concurrent * sizes.answer:
            raise RuntimeError(f"transformers drew {drawn} tokens, not {sizes.concurrent * sizes.answer}")
        # Its own stamps leave out what it sets up for every call, which a server would do once.
        spent = max(answer.lifespan[1] for answer in answers) - min(answer.lifespan[0] for answer in answers)
        spent = spent if spent > 0 else wall
        rates.append(drawn / spent)
        sink.note(concurrent=shape, transformers=transformers.__version__, wall_s=wall, serving_s=spent)
    sink.note(concurrent=shape, theirs=max(rates))
    sink.row(Row(f"{shape}: {sizes.concurrent} concurrent, transformers", max(rates), "token/s"))


def _modest(sizes: Sizes) -> Any:
    """Continuous batching without more memory than it needs."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(page_size=256, num_blocks=4 * sizes.concurrent, max_batch_tokens=512)


def contracts(setting: Setting, sink: Sink) -> None:
    """The tests that compare kernels, graphs and small steps with their plain twins, compiled for this device."""
    files = [f"tests/engine/test_{name}.py" for name in ("fused", "graphs", "choose", "attention")]
    # Without the project's own options: their plugins are not everywhere.
    options = ["-q", "-x", "-c", os.devnull, "--rootdir", ".", "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], capture_output=True, text=True, check=False
    )
    (setting.out / "contracts.txt").write_text(done.stdout + done.stderr)
    sink.note(contracts=done.returncode == 0, tail=done.stdout.splitlines()[-3:])
    sink.row(Row("contract tests on the device, exit status", done.returncode, "", bar=Bar("<=", 0, "")))


# --- all of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A process."""

    name: str
    seconds: int
    """Its own limit."""
    run: Callable[[Setting, Sink], None]


def parts(tiny: bool) -> tuple[Part, ...]:
    """In order of importance."""

    def of(name: str, shape: str, seconds: int, run: Callable[[str, Setting, Sink], None]) -> Part:
        return Part(f"{name}-{shape}", seconds, lambda setting, sink: run(shape, setting, sink))

    large, small = (TINY, TINY) if tiny else (LLAMA, QWEN)
    listed = (
        Part("machine", 60, machine),
        of("serve", large, 170, serve),
        of("serve", small, 120, serve),
        of("reference", large, 120, reference),
        of("reference", small, 90, reference),
        Part("attention", 90, attention),
        Part("contracts", 200, contracts),
    )
    return tuple({part.name: part for part in listed}.values())


def summary(found: Sequence[Mapping[str, Any]]) -> tuple[list[Row], list[Mapping[str, Any]]]:
    """Rows and notes of a results file, with transformers' figures beside ours."""
    rows = [
        Row(**{**line["row"], "bar": None if line["row"]["bar"] is None else Bar(**line["row"]["bar"])})
        for line in found
        if "row" in line
    ]
    notes = [line for line in found if "note" in line]
    pairs: dict[str, dict[str, float]] = {}
    for line in notes:
        if "concurrent" in line["note"]:
            pairs.setdefault(line["note"]["concurrent"], {}).update(line["note"])
    for shape, pair in pairs.items():
        if "ours" in pair and "theirs" in pair:
            name, bar = f"{shape}: concurrent, beside transformers", Bar(">=", 2.0, "x")
            rows.append(compared(name, "token/s", [pair["ours"]], pair["theirs"], "transformers", bar))
    return rows, notes


def report(out: Path) -> str:
    """Write results.md and results.json from what there is so far; returns the Markdown."""
    lines = (out / "results.jsonl").read_text().splitlines() if (out / "results.jsonl").exists() else []
    rows, notes = summary([json.loads(line) for line in lines])
    told = "\n".join(f"- {line['part']}: {json.dumps(line['note'], ensure_ascii=False)[:600]}" for line in notes)
    text = f"{render(rows)}\n\n{told}\n"
    (out / "results.md").write_text(text)
    (out / "results.json").write_text(json.dumps({"rows": [row.document() for row in rows], "notes": notes}, indent=1))
    return text


def _rates(out: Path) -> dict[str, float]:
    if not (out / "results.jsonl").exists():
        return {}
    found = [json.loads(line).get("note", {}) for line in (out / "results.jsonl").read_text().splitlines()]
    return {note["rate"]: note["value"] for note in found if "rate" in note}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or in a process of its own one of them; the exit status tells whether every part ended well."""
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and small counts: shows that it works")
    parser.add_argument("--parts", help="only these, by comma")
    parser.add_argument("--budget", type=int, default=570, help="seconds for all of it (default: 570)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    known = {part.name: part for part in parts(options.tiny)}
    wanted = list(known) if options.parts is None else options.parts.split(",")
    if unknown := set(wanted) - set(known):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.part is not None:
        return _run(known[options.part], options)
    (options.out / "results.jsonl").write_text("")
    deadline, failed = time.monotonic() + options.budget, []
    for name in wanted:
        left = min(known[name].seconds, deadline - time.monotonic())
        status = _spawn(name, options, left) if left > 20 else "skipped: no time left"
        print(f"== {name}: {status}", flush=True)
        if status != "done":
            failed.append(name)
            Sink(options.out / "results.jsonl", name).note(failed=name, error=status)
        report(options.out)
    print(report(options.out))
    return 1 if failed else 0


def _spawn(name: str, options: argparse.Namespace, seconds: float) -> str:
    """Run a part in a process of its own; returns `done`, or what went wrong."""
    command = [sys.executable, "-m", "loadtest.engine.gpu", "--part", name, "--out", str(options.out)]
    command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    try:
        status = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return "done" if status == 0 else f"exit status {status}"


def _run(part: Part, options: argparse.Namespace) -> int:
    sink = Sink(options.out / "results.jsonl", part.name)
    torch.manual_seed(0)
    setting = Setting(
        device=torch.device(options.device),
        dtype=torch.bfloat16 if options.device == "cuda" else torch.float32,
        sizes=SMALL if options.tiny else Sizes(),
        out=options.out,
        # Where the machine was not measured, shares of the ceilings come out as nothing.
        rates={"copy": float("inf"), "product": float("inf")} | _rates(options.out),
        tiny=options.tiny,
    )
    began = time.perf_counter()
    try:
        part.run(setting, sink)
    except Exception:  # whatever it is, the other parts run
        sink.note(failed=part.name, error=traceback.format_exc())
        return 1
    finally:
        sink.note(seconds=round(time.perf_counter() - began, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
