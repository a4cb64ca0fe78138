"""Train the bundled smoke-test model: `python -m loadtest.training.bundled --out engine/bundled`.

A Llama-layout decoder of 5.4 million parameters over a byte-level BPE of 4 096 tokens, from public-domain books alone.
Short rows, half of them repeats, with a scaffold (`loadtest.training.scaffold`) that shows how to copy from the
context; longer mixed rows carry that further, a few very long ones see to it that a long prompt does not keep an answer
from ending, and a last part has answers gone astray, which must end all the same. It takes 40 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.data import data_dir
from loadtest.training.autocast import autocast
from loadtest.training.samples import IGNORE, Row, Samples, Specials, read_books
from loadtest.training.scaffold import Scaffold

VOCABULARY = 4096
THETA = 100_000.0
"""Base of the rotary angles: the slower half of them hardly turns over the rows that are trained on."""
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "rope_theta": THETA,
    "initializer_range": 0.02,
    **IDS,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|system|>Tools: ' + (tools | tojson) + '<|end|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] %}
{{- raise_exception('Unknown role: ' + message.role) }}
{%- endif %}
{{- '<|' + ('system' if message.role == 'developer' else message.role) + '|>' }}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{{- message.content | map(attribute='text') | join('\\n') }}
{%- endif %}
{%- if message.tool_calls %}
{{- message.tool_calls | tojson }}
{%- endif %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one row length, and the share of each kind of sample."""

    steps: int
    length: int
    batch: int
    mix: Mapping[str, float]


PHASES = (
    Phase(450, 256, 16, {"book": 0.5, "repeat": 0.5}),
    Phase(700, 640, 6, {"book": 0.30, "repeat": 0.07, "quotes": 0.20, "facts": 0.18, "chats": 0.25}),
    Phase(60, 2048, 2, {"book": 0.2, "quotes": 0.2, "facts": 0.15, "chats": 0.2, "long_chat": 0.25}),
    Phase(20, 4096, 1, {"book": 0.4, "quotes": 0.2, "long_chat": 0.4}),
    Phase(320, 640, 6, {"book": 0.2, "quotes": 0.2, "facts": 0.15, "chats": 0.25, "endings": 0.2}),
)
WARM_UP = 50
DECAY_FROM = 0.5
"""Share of the run after which the rate falls to a twentieth."""
RATE = 2e-3
"""Highest rate of AdamW, for embeddings and norms; a tenth of Muon's, for what lies between."""
SCAFFOLD, SCAFFOLD_STEPS, SCAFFOLD_LEFT = 1.0, 700, 0.15
"""Weight of the scaffold's loss at first; it falls by as much over so many steps, down to what is left to the end.
Without it copying stays, and resting on the first token fades."""


def train_tokenizer(books: str) -> Tokenizer:
    """Byte-level BPE: every text can be written, digits stand alone so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books.split("\n\n"), trainer)
    return tokenizer


def new_model() -> nn.Module:
    """The decoder as transformers builds it: the engine's own cannot be trained."""
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if "dtype" not in k}))
    return model


def batches(samples: Samples, rng: np.random.Generator, phases: tuple[Phase, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [batch, length], step after step."""
    for phase in phases:
        kinds, shares = zip(*phase.mix.items(), strict=True)
        for _ in range(phase.steps):
            rows: list[Row] = [
                getattr(samples, kinds[kind])(phase.length)
                for kind in rng.choice(len(kinds), size=phase.batch, p=shares)
            ]
            inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
            yield inputs, targets


def rate(step: int, total: int) -> float:
    """Share of the peak rate: warm up, hold, then fall in a line."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    left = (total - step) / (total * (1 - DECAY_FROM))
    return max(0.05, min(1.0, left))


def train(model: nn.Module, samples: Samples, rng: np.random.Generator, phases: tuple[Phase, ...]) -> None:
    """Muon and AdamW; prints the running loss."""
    total = sum(phase.steps for phase in phases)
    optimizers, scaffold = _optimizers(model), Scaffold(model)
    began, mean = time.monotonic(), 0.0
    for step, (inputs, targets) in enumerate(batches(samples, rng, phases)):
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, total)
        loss = loss_of(model, inputs, targets)
        shown = max(SCAFFOLD_LEFT, SCAFFOLD * (1 - step / SCAFFOLD_STEPS))
        (loss + shown * scaffold.loss(inputs)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = 0.95 * mean + 0.05 * loss.item() if step else loss.item()
        if step % 25 == 0 or step == total - 1:
            seconds = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} s of CPU"
            print(f"step {step}/{total} loss {mean:.3f} {copied(model, samples)} {seconds}", flush=True)


def _optimizers(model: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its peak rate. What adds to the stream begins at zero: Muon makes it as large as it has to be."""
    inner = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name}
    for name, weight in inner.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
    outer = [weight for name, weight in model.named_parameters() if name not in inner]
    muon = torch.optim.Muon(inner.values(), lr=10 * RATE, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(outer, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    return [(muon, 10 * RATE), (adam, RATE)]


@torch.no_grad()
def copied(model: nn.Module, samples: Samples) -> str:
    """What a passage costs per token when it stands there for the first time, and 300 tokens later once more."""
    rows = torch.from_numpy(np.stack([samples.recalled(50, 300) for _ in range(4)]))
    scores = model(rows, use_cache=False).logits.float().log_softmax(-1)
    costs = -scores[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    return f"new {costs[:, 4:49].mean():.2f} again {costs[:, -45:].mean():.2f}"


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are to be learned."""
    with autocast():
        scores = model(inputs, use_cache=False).logits
    return functional.cross_entropy(scores.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def save(model: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    """Write the Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write(out / "config.json", CONFIG)
    _write(out / "generation_config.json", {**IDS, "min_new_tokens": 1})  # never an empty answer
    _write(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL_TOKENS[0],
            "bos_token": SPECIAL_TOKENS[1],
            "eos_token": SPECIAL_TOKENS[2],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Train everything from the books and write it out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    books = read_books(data_dir())
    tokenizer = train_tokenizer(books)
    # Special tokens get the first ids, in their order; the padding token is never learned.
    specials = Specials(*range(1, 6))
    samples = Samples(books, tokenizer, specials, rng)
    model = new_model()
    train(model, samples, rng, PHASES)
    save(model, tokenizer, args.out)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    main()
