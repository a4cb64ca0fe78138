"""The part of a checkpoint's `config.json` that shapes the computation, read once and closed.

Both layouts are understood: `rope_parameters` (transformers 5) and the older `rope_theta` with `rope_scaling`.
Defaults of absent keys are those of the reference implementation of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from engine.errors import CheckpointError

Family = Literal["llama", "qwen2", "qwen3", "mistral"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base, and how it is stretched beyond the length it was trained on."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder of the Llama kind."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens; None attends to everything before."""
    rope: RopeConfig
    eos_ids: tuple[int, ...]
    dtype: str
    """What the weights were saved as, e.g. `bfloat16`."""

    @property
    def context(self) -> int:
        """Longest text in tokens. Dynamic scaling starts where the trained length ends; other kinds include theirs."""
        return int(self.max_positions * self.rope.factor) if self.rope.kind == "dynamic" else self.max_positions


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a decoded `config.json`. Raises CheckpointError naming the field."""
    family = _family(raw)
    heads = _int(raw, "num_attention_heads")
    hidden = _int(raw, "hidden_size")
    kv_heads = _int(raw, "num_key_value_heads", 8 if family == "mistral" else heads)
    layers = _int(raw, "num_hidden_layers")
    default_head_dim = 128 if family == "qwen3" else hidden // heads
    if heads % kv_heads:
        raise _wrong("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads ({heads})")
    if raw.get("hidden_act", "silu") != "silu":
        raise _wrong("hidden_act", f"{raw['hidden_act']!r} is not supported, only 'silu'")
    head_dim = _int(raw, "head_dim", default_head_dim)
    if head_dim % 2:
        raise _wrong("head_dim", f"{head_dim} is odd; rotary embeddings need pairs")
    max_positions = _int(raw, "max_position_embeddings")
    bias = _bool(raw, "attention_bias", False) if family in ("llama", "qwen3") else False
    return ModelConfig(
        family=family,
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_int(raw, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_float(raw, "rms_norm_eps", 1e-6),
        max_positions=max_positions,
        tied=_bool(raw, "tie_word_embeddings", False),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family == "llama" and _bool(raw, "mlp_bias", False),
        qk_norm=family == "qwen3",
        windows=_windows(raw, family, layers),
        rope=_rope(raw, max_positions),
        eos_ids=eos_ids(raw),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids of `config.json` or `generation_config.json`: absent, one number, or a list."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise _wrong("eos_token_id", f"{value!r} is neither a token id nor a list of them")
    return tuple(ids)


def _family(raw: Mapping[str, Any]) -> Family:
    kind = raw.get("model_type")
    if kind not in get_args(Family):
        known = ", ".join(get_args(Family))
        raise _wrong("model_type", f"{kind!r} is not a supported architecture (supported: {known})")
    return cast(Family, kind)


def _windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer: none in Llama, all layers in Mistral, listed or from a layer on in Qwen."""
    match family:
        case "llama":
            return (None,) * layers
        case "mistral":
            return (_window(raw),) * layers
        case "qwen2" | "qwen3":
            window = _window(raw) if _bool(raw, "use_sliding_window", False) else None
            first = _int(raw, "max_window_layers", 28, least=0)
            kinds = raw.get("layer_types") or [
                "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)
            ]
            if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
                raise _wrong("layer_types", f"expected {layers} of 'full_attention' or 'sliding_attention'")
            return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(raw: Mapping[str, Any]) -> int | None:
    if raw.get("sliding_window", 4096) is None:
        return None
    return _int(raw, "sliding_window", 4096)


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # Older checkpoints keep the base beside the scaling, newer ones inside it.
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = raw.get(field) or {}
    if not isinstance(scaling, dict):
        raise _wrong(field, "expected an object")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise _wrong(f"{field}.rope_type", f"{kind!r} is not supported ({', '.join(get_args(RopeKind))})")
    partial = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise _wrong("partial_rotary_factor", f"{partial!r} is not supported, only 1.0")
    theta = _float({"rope_theta": 10_000.0, **_only(raw, "rope_theta"), **_only(scaling, "rope_theta")}, "rope_theta")
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    original = _int({"v": original or max_positions}, "v", name=f"{field}.original_max_position_embeddings")
    if kind == "yarn" and scaling.get("factor") is None:
        factor = max_positions / original
    elif kind == "default":
        factor = 1.0
    else:
        factor = _float(scaling, "factor", name=f"{field}.factor")
    return RopeConfig(
        kind=cast(RopeKind, kind),
        theta=theta,
        factor=factor,
        original_max_positions=original,
        low_freq_factor=_float(scaling, "low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=_float(scaling, "high_freq_factor", None if kind == "llama3" else 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=_bool(scaling, "truncate", True),
    )


def _only(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: raw[key]} if raw.get(key) is not None else {}


def _wrong(field: str, problem: str) -> CheckpointError:
    return CheckpointError(f"config.json: {field}: {problem}")


def _int(raw: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, name: str = "") -> int:
    value = raw.get(key) if raw.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(name or key, f"expected a whole number of at least {least}, got {value!r}")
    return value


def _float(raw: Mapping[str, Any], key: str, default: float | None = None, *, name: str = "") -> float:
    value = raw.get(key) if raw.get(key) is not None else default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong(name or key, f"expected a positive number, got {value!r}")
    return float(value)


def _bool(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key) if raw.get(key) is not None else default
    if not isinstance(value, bool):
        raise _wrong(key, f"expected true or false, got {value!r}")
    return value
