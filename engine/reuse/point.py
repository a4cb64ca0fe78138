"""The operating point: which selector, at which ratio, on what kind of chunks, was found good enough for one model.

`hitpath engine calibrate` writes it, the engine uses nothing else: without one everything is computed. A file is
closed: an unknown key, a value of another kind or out of its range is an error that names file and key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from cachestore.kv.codecs import CODECS
from engine.errors import SettingsError
from engine.reuse.blending import Selector
from engine.reuse.cachecraft import CacheCraft
from engine.reuse.selectors import CacheBlend, Epic, Full, KvShare, Nothing
from engine.reuse.sensitivity import Early, Sensitive

VERSION = 1
"""Grows when an older reader would misunderstand a file."""

FILE = "reuse.json"
"""Its name beside a model; see `beside`."""

SelectorName = Literal["full", "none", "epic", "cacheblend", "kvshare", "cachecraft", "sensitive", "early"]
Stored = Literal["mean", "head", "alone", "seen"]
Dtype = Literal["float32", "bfloat16", "float16"]

_MOST_VERSIONS = 16

MOST_REPAIRED = 7
"""Tokens computed beside each one drawn; what KVShare has (arXiv 2503.16525)."""

_LAYER = 1
"""Check layer of those that have one."""

_MADE: Mapping[SelectorName, Callable[[float], Selector]] = {
    "full": lambda ratio: Full(),
    "none": lambda ratio: Nothing(),
    "epic": Epic,
    "cacheblend": lambda ratio: CacheBlend(((_LAYER, ratio),)),
    "kvshare": lambda ratio: KvShare(ratio, _LAYER),
    # Its own formula says how much of each chunk, from 0 to 1 at scale 1; the ratio is twice what that is unknown.
    "cachecraft": lambda ratio: CacheCraft(scale=2 * ratio),
    "sensitive": Sensitive,
    "early": Early,
}


def selector_of(name: SelectorName, ratio: float) -> Selector:
    """A selector by the name that points call it."""
    return _MADE[name](ratio)


class PointError(SettingsError):
    """An operating point cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What was measured at the point, against computing everything."""

    kl: float
    """Nats: mean KL(full ‖ reused) of the tokens that were looked at."""
    agreement: float
    """Share of them where both find the same token most likely."""
    relative_time: float
    """Time to the first token, all chunks stored, relative to computing everything."""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """How chunks are reused for one model."""

    model: str
    """Fingerprint of the weights (`Checkpoint.fingerprint`)."""
    dtype: Dtype
    selector: SelectorName
    ratio: float
    """Share of reused tokens that is computed again at least."""
    stored: Stored
    """What is kept of a chunk in the end: the mean of it behind several texts, computed behind the template's head,
    computed alone, or as first seen in a prompt."""
    codec: str
    """What it is written as below the pool; one of `cachestore.kv.codecs.CODECS`."""
    loss: Loss
    most_loss: float
    """Nats, more than 0: what `loss.kl` was allowed to be. The running check switches reuse off when it finds more …"""
    least_agreement: float = 0.9
    """… or that less than this share of first tokens agrees; more than 0."""
    check_share: float = 0.01
    """Share of blended requests that is compared with full computing when there is time."""
    least: int = 64
    """Tokens of a text that is worth keeping as a chunk."""
    versions: int = 3
    """Chunks of one text, from several contexts, that are kept at most where context indices choose between them."""
    repair: int = 0
    """Tokens computed again with each token drawn, of those that were not in the prefill: those first that the
    selector finds are missed most, where it looks, else the first ones."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch calls it."""
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def indexed(self) -> bool:
        """Whether chunks are kept with their context index, and in several versions."""
        return self.selector == "cachecraft"

    def made(self, ratio: float | None = None) -> Selector:
        """Its selector; with a larger ratio than the point's where there is time for more."""
        return selector_of(self.selector, max(self.ratio, ratio or 0.0))

    def check_model(self, fingerprint: str, dtype: torch.dtype, where: str) -> None:
        """Raises PointError where this is another model's, or another dtype's; `where` names the file."""
        if self.model != fingerprint:
            raise PointError(f"{where}: model: measured for {self.model}, this one is {fingerprint}; calibrate it anew")
        if self.torch_dtype != dtype:
            served = str(dtype).removeprefix("torch.")
            raise PointError(f"{where}: dtype: measured in {self.dtype}, this engine computes in {served}")

    def save(self, path: Path) -> None:
        """Write it; whoever reads meanwhile sees the old file or the new one."""
        passing = path.with_name(path.name + ".tmp")
        passing.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n", "utf-8")
        passing.replace(path)


def beside(directory: Path, dtype: torch.dtype) -> Path:
    """Where a model's point for this dtype is, or goes: `reuse.json`, unless that is another dtype's."""
    name = str(dtype).removeprefix("torch.")
    plain, own = directory / FILE, directory / f"reuse-{name}.json"
    if own.is_file():
        return own
    try:
        return plain if json.loads(plain.read_bytes())["dtype"] == name else own
    except (OSError, ValueError, KeyError, TypeError):
        return plain  # who loads it says what is wrong with it


def load(path: Path) -> OperatingPoint:
    """Read one. Raises PointError naming file and key."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PointError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise PointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    version = raw.pop("version", None)
    if version != VERSION:
        raise PointError(f"{path}: version: {version!r} is not {VERSION}, which this engine reads")
    return _Reader(str(path)).point(raw)


class _Reader:
    """Turns a decoded file into a point, or says what is wrong with it."""

    def __init__(self, where: str) -> None:
        self._where = where

    def point(self, raw: dict[str, Any]) -> OperatingPoint:
        known = {field.name: field for field in fields(OperatingPoint)}
        optional = {"least_agreement", "check_share", "least", "versions", "repair"}
        self._closed(raw, set(known), optional)
        given = {**{name: known[name].default for name in optional}, **raw}
        loss = given["loss"]
        if not isinstance(loss, dict):
            raise self._wrong("loss", loss, "an object")
        if given["selector"] == "cachecraft" and given["stored"] != "seen":
            raise self._wrong("stored", given["stored"], "seen, as the selector cachecraft needs it")
        self._closed(loss, {field.name for field in fields(Loss)}, set(), "loss.")
        return OperatingPoint(
            model=self._text("model", given["model"]),
            dtype=cast(Dtype, self._one_of("dtype", given["dtype"], get_args(Dtype))),
            selector=cast(SelectorName, self._one_of("selector", given["selector"], get_args(SelectorName))),
            ratio=self._number("ratio", given["ratio"], most=1.0),
            stored=cast(Stored, self._one_of("stored", given["stored"], get_args(Stored))),
            codec=self._one_of("codec", given["codec"], tuple(CODECS)),
            loss=Loss(
                kl=self._number("loss.kl", loss["kl"]),
                agreement=self._number("loss.agreement", loss["agreement"], most=1.0),
                relative_time=self._number("loss.relative_time", loss["relative_time"]),
            ),
            most_loss=self._number("most_loss", given["most_loss"], above=True),
            least_agreement=self._number("least_agreement", given["least_agreement"], most=1.0, above=True),
            check_share=self._number("check_share", given["check_share"], most=1.0),
            least=self._count("least", given["least"], 1),
            versions=self._count("versions", given["versions"], 1, _MOST_VERSIONS),
            repair=self._count("repair", given["repair"], 0, MOST_REPAIRED),
        )

    def _closed(self, raw: Mapping[str, Any], known: set[str], optional: set[str], prefix: str = "") -> None:
        if unknown := sorted(raw.keys() - known):
            raise PointError(f"{self._where}: {prefix}{unknown[0]}: no such key (known: {', '.join(sorted(known))})")
        if missing := sorted(known - optional - raw.keys()):
            raise PointError(f"{self._where}: {prefix}{missing[0]}: missing")

    def _wrong(self, key: str, value: object, wanted: str) -> PointError:
        return PointError(f"{self._where}: {key}: expected {wanted}, got {value!r}")

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise self._wrong(key, value, "text")
        return value

    def _one_of(self, key: str, value: object, allowed: tuple[str, ...]) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(key, value, f"one of {', '.join(allowed)}")
        return value

    def _number(self, key: str, value: object, most: float = math.inf, *, above: bool = False) -> float:
        number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not number or not 0 <= value <= most or (above and value == 0):  # type: ignore[operator]
            least = "above 0" if above else "from 0 on"
            raise self._wrong(key, value, f"a number {least}" + ("" if most == math.inf else f" and up to {most:g}"))
        return float(value)  # type: ignore[arg-type]

    def _count(self, key: str, value: object, least: int, most: float = math.inf) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            above = "" if most == math.inf else f" and at most {most}"
            raise self._wrong(key, value, f"a whole number of at least {least}{above}")
        return value
