"""The settings file: closed, grouped and loud.

An unknown key, a bad unit or an impossible pair stops the start with the key's full name and what would be valid.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from gateway.memory import default_budget
from policies import units
from policies.category import PAIR_THRESHOLD, CategoryPolicy, CategoryTable, Rule
from policies.controls import Mode
from policies.examples import ExampleRules
from policies.freshness import FreshnessRules
from policies.personal import Handling
from policies.sharing import SharingRules

SHARED = "shared"
"""The namespace of what tenants share."""
_GIB = 2**30
_ROUNDING = 1e-9
"""By how much shares that add up to the whole may seem to exceed it."""


class SettingsError(Exception):
    """The settings cannot be used; the message has one line per fault, each with the key's full name."""


class _KeyFault(ValueError):
    """A fault that only the whole group shows, but that belongs to one key of it."""

    def __init__(self, key: str, message: str) -> None:
        """`key` is dotted, from the group on."""
        super().__init__(message)
        self.key = key


def _unit(parse: Callable[[object], float]) -> BeforeValidator:
    return BeforeValidator(parse)


def _yaml_off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false; here it is the name of a mode."""
    return "off" if value is False else value


def _pace(value: object) -> float:
    """`fast` is no pace at all."""
    return 0.0 if value == "fast" else units.rate(value)


def _pace_text(pace: float) -> str:
    return f"{Decimal(str(pace)):f}/s" if pace else "fast"


CacheMode = Annotated[Mode, BeforeValidator(_yaml_off)]
Size = Annotated[int, _unit(units.size)]
Duration = Annotated[float, _unit(units.duration)]
Share = Annotated[float, _unit(units.share)]
Rate = Annotated[float, _unit(units.rate), PlainSerializer(lambda rate: f"{Decimal(str(rate)):f}/s")]
Pace = Annotated[float, _unit(_pace), PlainSerializer(_pace_text)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(_Group):
    """Where the gateway listens and what it takes in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    uds: Path | None = None
    max_body: Size = 32 * 2**20
    """Largest request body on a cached path; passed-through bodies are streamed and not bounded."""


class Admin(_Group):
    """The operators' own endpoints; off while the environment variable is unset."""

    key_env: str = "HITPATH_ADMIN_KEY"


class Timeouts(_Group):
    """How long a backend may keep the gateway waiting."""

    connect: Duration = 5.0
    first_byte: Duration = 600.0
    """Until the answer's head; a non-streamed generation takes its whole time here."""
    idle: Duration = 120.0
    """Between two pieces of an answer."""


class Price(_Group):
    """What a backend's tokens cost, in any currency, per million."""

    input: Annotated[float, Field(ge=0.0)] = 0.0
    output: Annotated[float, Field(ge=0.0)] = 0.0


_OWN_FLAGS = frozenset({"--model", "--host", "--port", "--uds", "--parent-pid"})
"""Of the bundled engine."""


class Upstream(_Group):
    """One backend."""

    name: Name
    kind: Literal["bundled", "openai", "vllm", "sglang"]
    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+")] | None = None
    """Base URL that ends in the version, such as http://10.0.0.7:8000/v1."""
    model: str = "bundled"
    """For kind bundled: the checkpoint's folder, or bundled."""
    flags: tuple[str, ...] = ()
    """For kind bundled: further flags of `hitpath engine`, such as [--kv-disk, /var/lib/hitpath/kv]."""
    models: tuple[str, ...] | None = None
    """Models that it serves, with shell-style patterns; left out: asked from the bundled engine, else all."""
    api_key_env: str | None = None
    timeouts: Timeouts = Timeouts()
    slots: Annotated[int, Field(ge=1, le=2**20)] = 64
    """Calls that it runs at once without slowing down; its load is measured by this."""
    objective: Annotated[Duration, Field(gt=0.0)] = 10.0
    """Seconds that a whole call should take at most; its load is measured by this too."""
    price: Price | None = None

    @model_validator(mode="after")
    def _url_belongs_to_kind(self) -> Self:
        if self.kind == "bundled" and self.url is not None:
            raise _KeyFault("url", "kind bundled takes no url: the gateway starts this engine itself")
        if self.kind != "bundled" and self.url is None:
            raise _KeyFault("url", f"kind {self.kind} needs a url such as http://10.0.0.7:8000/v1")
        return self

    @model_validator(mode="after")
    def _flags_belong_to_kind(self) -> Self:
        if self.kind != "bundled" and self.flags:
            raise _KeyFault("flags", f"kind {self.kind} takes no flags: the gateway does not start it")
        for flag in self.flags:
            if (name := flag.partition("=")[0]) in _OWN_FLAGS:
                raise _KeyFault("flags", f"{name} is the gateway's to set")
        return self


class SqliteLog(_Group):
    """The embedded log in the data directory."""

    kind: Literal["sqlite"] = "sqlite"


class LocalEmbedder(_Group):
    """MiniLM inside the gateway's process."""

    kind: Literal["local"]
    threads: Annotated[int, Field(ge=1, le=64)] = 1


class OpenaiEmbedder(_Group):
    """An OpenAI-compatible embeddings endpoint."""

    kind: Literal["openai"]
    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+")]
    model: str
    api_key_env: str | None = None
    timeout: Duration = 5.0


class NoEmbedder(_Group):
    """No comparison by meaning: the semantic stage is off."""

    kind: Literal["none"]


class JudgeSettings(_Group):
    """Who decides whether a similar question's answer serves."""

    kind: Literal["pair", "threshold"] = "pair"
    on_missing: Literal["stop", "threshold"] = "stop"
    """What happens when the pair model's files are missing or damaged."""


class Budgets(_Group):
    """How error budgets are kept."""

    keep: bool = True
    start: Literal["judge", "earned"] = "judge"
    """judge: its word is taken until labels speak; earned: nothing is served by meaning before they do."""
    risk: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    horizon: Annotated[int, Field(ge=1)] = 5000
    checked_min: Annotated[Share, Field(gt=0.0)] = 0.05
    """Share of the hits that is always checked."""
    checked_max: Annotated[Share, Field(gt=0.0)] | None = None
    """Share that is checked while little is saved up; left out: 10 % where the judge is believed, else all."""
    concurrent: Annotated[int, Field(ge=1, le=256)] = 2
    waiting: Annotated[int, Field(ge=1, le=4096)] = 64
    busy_above: Probability = 0.5
    """Load from which on no hit is checked."""
    judge_model: str | None = None
    """Model that compares two answers where words and similarity do not tell."""
    refresh_within: Duration = 10.0
    """How soon after a hit by meaning a refresh counts as a complaint."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.checked_min > self.most:
            raise _KeyFault("checked_min", f"{self.checked_min:.0%} is above checked_max, which is {self.most:.0%}")
        return self

    @property
    def most(self) -> float:
        """The share that is checked while little is saved up."""
        return (0.1 if self.start == "judge" else 1.0) if self.checked_max is None else self.checked_max


class Economics(_Group):
    """When comparing by meaning is skipped because it does not pay."""

    skip: bool = True
    evidence: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Look-ups before anything is judged, and the length of a probe."""
    pause: Annotated[int, Field(ge=1, le=10**8)] = 5000
    """Calls that the first pause skips."""
    longest_pause: Annotated[int, Field(ge=1, le=10**9)] = 160_000

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.pause > self.longest_pause:
            raise _KeyFault("pause", f"{self.pause} is above longest_pause, which is {self.longest_pause}")
        return self


class LoadSettings(_Group):
    """When a backend counts as loaded, and what gives way then."""

    engage: Probability = 0.5
    release: Probability = 0.25
    rise: Annotated[Duration, Field(gt=0.0)] = 2.0
    fall: Annotated[Duration, Field(gt=0.0)] = 20.0
    stretch: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.release >= self.engage:
            raise _KeyFault("release", f"{self.release:g} is not below engage, which is {self.engage:g}")
        return self


class NearMissSettings(_Group):
    """The log of what came close and was not served."""

    keep: Annotated[Literal["off", "figures", "text"], BeforeValidator(_yaml_off)] = "off"
    size: Size = 8 * 2**20


class Quota(_Group):
    """A category's share of the cache: kept for it, and lent to it only while free."""

    min: Share = 0.0
    max: Share = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise _KeyFault("min", f"{self.min:.0%} is above max, which is {self.max:.0%}")
        return self


class Freshness(_Group):
    """The longest TTL of answers to questions about relative times; 0s keeps them out of the cache."""

    year: Duration = 7 * 86400.0
    week: Duration = 6 * 3600.0
    day: Duration = 900.0
    now: Duration = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.year >= self.week >= self.day >= self.now:
            raise ValueError("what changes sooner cannot live longer: year >= week >= day >= now must hold")
        return self


class Example(_Group):
    """A near answer as an example for a cheaper model."""

    model: str
    similarity: Probability = 0.6
    """Cosine from which an answer that may not be served may be an example."""


class CategoryRules(_Group):
    """One category's own rules; what is left out comes from cache.default and the built-in caution."""

    mode: CacheMode | None = None
    threshold: Probability | None = None
    ttl: Duration | None = None
    quota: Quota | None = None
    error_budget: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    max_relax: Probability | None = None
    ttl_jitter: Annotated[Share, Field(lt=1.0)] | None = None
    freshness: Freshness | None = None
    stale_while_revalidate: Duration | None = None
    stale_if_error: Duration | None = None
    admit_after: Annotated[int, Field(ge=1, le=255)] | None = None
    replay_pace: Pace | None = None
    personal: Literal["private", "never"] | None = None
    example: Example | None = None

    def overrides(self) -> dict[str, Any]:
        """Return what is set, under the names that CategoryPolicy uses."""
        given = {name: value for name, value in self if name not in _GROUPED and value is not None}
        if self.quota is not None:
            given |= {"quota_min": self.quota.min, "quota_max": self.quota.max}
        if self.freshness is not None:
            given["freshness"] = FreshnessRules(**self.freshness.model_dump())
        if self.personal is not None:
            given["personal"] = Handling(self.personal)
        if self.example is not None:
            given["example"] = ExampleRules(**self.example.model_dump())
        return given


_GROUPED = frozenset({"quota", "freshness", "personal", "example"})
"""Rules that CategoryPolicy has in another form."""


class Sharing(_Group):
    """When an answer may be shared between tenants; for cache.shared."""

    tenants: Annotated[int, Field(ge=1, le=16)] = 3
    """Independent tenants whose answers to the same question must agree; 1 shares at once."""
    window: Duration = 7 * 86400.0
    questions: Annotated[int, Field(ge=1, le=2**20)] = 4096
    """Questions that are remembered while they wait for the others."""

    def rules(self) -> SharingRules:
        """Return the rules; one tenant alone may hold an eighth of what waits."""
        return SharingRules(self.tenants, self.window, self.questions, max(1, self.questions // 8))


class When(_Group):
    """A rule's conditions; all that are set must hold."""

    system_contains: str | None = None
    user_contains: str | None = None
    model: str | None = None
    endpoint: Literal["chat", "completions", "embeddings", "responses"] | None = None
    namespace: str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"needs at least one condition of {', '.join(type(self).model_fields)}")
        return self


class CategoryRule(_Group):
    """Names a category before the classifier is asked."""

    category: str
    when: When


class Cache(_Group):
    """What is remembered, for how long, and how much of it."""

    memory_budget: Size | None = None
    """Bytes for vectors, index, tables and hot bodies; left out: 2 GiB, or a quarter of the container's limit."""
    disk_budget: Size = 10 * _GIB
    max_answer: Size = 4 * 2**20
    stale_grace: Duration = 3600.0
    """How long an expired answer is kept for callers that accept it when the backend fails."""
    shared: bool = False
    sharing: Sharing = Sharing()
    log: SqliteLog = SqliteLog()
    embedder: Annotated[LocalEmbedder | OpenaiEmbedder | NoEmbedder, Field(discriminator="kind")] = LocalEmbedder(
        kind="local"
    )
    judge: JudgeSettings = JudgeSettings()
    budgets: Budgets = Budgets()
    economics: Economics = Economics()
    load: LoadSettings = LoadSettings()
    near_misses: NearMissSettings = NearMissSettings()
    default: CategoryRules = CategoryRules()
    categories: dict[Name, CategoryRules] = {}
    rules: tuple[CategoryRule, ...] = ()

    @model_validator(mode="after")
    def _quotas_fit(self) -> Self:
        reserved = sum(policy.quota_min for policy in self.table().policies.values())
        if reserved > 1 + _ROUNDING:
            raise _KeyFault("categories", f"the quotas' min shares add up to {reserved:.0%}, more than the whole")
        return self

    @model_validator(mode="after")
    def _stale_answers_are_still_there(self) -> Self:
        for name, rules in {"default": self.default, **self.categories}.items():
            for key in ("stale_while_revalidate", "stale_if_error"):
                if (getattr(rules, key) or 0.0) > self.stale_grace:
                    where = "default" if rules is self.default else f"categories.{name}"
                    raise _KeyFault(f"{where}.{key}", f"is longer than cache.stale_grace, {self.stale_grace:g}s")
        return self

    @model_validator(mode="after")
    def _rules_name_categories(self) -> Self:
        known = CategoryTable(CategoryPolicy("default"), {name: {} for name in self.categories}).policies
        for position, rule in enumerate(self.rules):
            if rule.category not in known:
                raise _KeyFault(f"rules.{position}.category", f"{rule.category!r} is not one of {', '.join(known)}")
        return self

    def memory(self) -> int:
        """Return the memory budget in bytes."""
        return default_budget() if self.memory_budget is None else self.memory_budget

    def table(self, *, judged: bool | None = None) -> CategoryTable:
        """Return the categories with all their rules; `judged`: the pair model is there; None: as the settings say."""
        judged = self.judge.kind == "pair" if judged is None else judged
        default = {"threshold": PAIR_THRESHOLD} if judged else {}
        return CategoryTable(
            CategoryPolicy("default", **default | self.default.overrides()),
            {name: rules.overrides() for name, rules in self.categories.items()},
            [Rule(rule.category, **rule.when.model_dump()) for rule in self.rules],
            judged=judged,
        )


class Tenant(_Group):
    """A client with a key of its own, and a namespace of its own."""

    name: Name
    key_env: str
    rate_limit: Rate | None = None


class Settings(_Group):
    """Everything that can be set."""

    server: Server = Server()
    data_dir: Path = Path("hitpath-data")
    admin: Admin = Admin()
    upstreams: tuple[Upstream, ...] = ()
    cache: Cache = Cache()
    tenants: tuple[Tenant, ...] = ()

    @field_validator("upstreams", "tenants")
    @classmethod
    def _names_differ(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [item.name for item in value]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {repeated[0]!r} is used twice")
        return value

    @model_validator(mode="after")
    def _nobody_is_everybody(self) -> Self:
        if self.cache.shared and any(tenant.name == SHARED for tenant in self.tenants):
            raise _KeyFault("tenants", f"with cache.shared, {SHARED!r} is the name of what all tenants share")
        return self

    def effective_upstreams(self) -> tuple[Upstream, ...]:
        """Return the backends; none set means the bundled engine with the bundled model."""
        return self.upstreams or (Upstream(name="bundled", kind="bundled"),)

    def document(self) -> dict[str, Any]:
        """Return what is in force, defaults filled in, in a form that can be read again."""
        categories = {
            name: {
                "mode": str(policy.mode),
                "threshold": policy.threshold,
                "ttl": policy.ttl,
                "quota": {"min": policy.quota_min, "max": policy.quota_max},
                "error_budget": policy.error_budget,
                "max_relax": policy.max_relax,
                "ttl_jitter": policy.ttl_jitter,
                "freshness": asdict(policy.freshness),
                "stale_while_revalidate": policy.stale_while_revalidate,
                "stale_if_error": policy.stale_if_error,
                "admit_after": policy.admit_after,
                "replay_pace": _pace_text(policy.replay_pace),
                "personal": str(policy.personal),
                **({} if policy.example is None else {"example": asdict(policy.example)}),
            }
            for name, policy in self.cache.table().policies.items()
        }
        document = self.model_dump(mode="json", exclude_none=True)
        document["upstreams"] = [
            upstream.model_dump(mode="json", exclude_none=True) for upstream in self.effective_upstreams()
        ]
        document["cache"] |= {"categories": categories, "memory_budget": self.cache.memory()}
        return document


def load(path: Path | None) -> Settings:
    """Read a settings file; None gives the defaults. Raises SettingsError."""
    if path is None:
        return Settings()
    try:
        document = yaml.load(path.read_text("utf-8"), Loader=_LoudLoader)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: bytes that are no text, and dates that do not exist.
        raise SettingsError(f"{path}: is not YAML: {error}") from error
    if document is not None and not isinstance(document, dict):
        raise SettingsError(f"{path}: must be a mapping of {', '.join(Settings.model_fields)}")
    return validate(document or {}, source=str(path))


def validate(document: Mapping[str, Any], *, source: str) -> Settings:
    """Check a parsed settings document. Raises SettingsError naming each wrong key in full."""
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{source}: {_line(fault)}" for fault in error.errors())) from error


def secret(variable: str | None, *, key: str) -> str | None:
    """Return the value of the environment variable that a setting names. Raises SettingsError when it is unset."""
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise SettingsError(f"{key}: the environment variable {variable} is not set")
    return value


_MERGE = "tag:yaml.org,2002:merge"
"""The tag of `<<`, which takes over another mapping's keys and may stand beside itself."""


class _LoudLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = nodes[position].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", mark)
        return dict(super().construct_mapping(node, deep=deep))


def _line(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    path = ".".join(str(part) for part in (*_without_tags(fault["loc"]), *_inner_key(kind, context.get("error"))))
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_valid_keys(fault['loc'])}"
    if kind == "string_pattern_mismatch":
        message = f"{fault['input']!r} does not match {context['pattern']}"
    elif kind in _NO_EMBEDDER_KIND:
        message = f"should be one of {', '.join(_EMBEDDERS)}"
    elif not kind.startswith("value_error") and kind != "missing":
        message = f"{message}, got {fault['input']!r}"
    return f"{path}: {message}" if path else message


_NO_EMBEDDER_KIND = frozenset({"union_tag_invalid", "union_tag_not_found"})
"""The embedder is the one group whose keys depend on its kind."""


def _inner_key(kind: str, error: object) -> tuple[str, ...]:
    """Return the key that a group's fault belongs to, from the group on."""
    if kind in _NO_EMBEDDER_KIND:
        return ("kind",)
    return (error.key,) if isinstance(error, _KeyFault) else ()


def _without_tags(location: tuple[int | str, ...]) -> list[int | str]:
    """Leave out the embedder's kind, which pydantic puts into the path of what lies below it."""
    tagged = {position + 1 for position, part in enumerate(location) if part == "embedder"}
    return [part for position, part in enumerate(location) if position not in tagged]


def _valid_keys(location: tuple[int | str, ...]) -> str:
    """Name the keys that would be valid where an unknown one was found, as far as the path can be followed."""
    group: type[_Group] | None = Settings
    for position, part in enumerate(location[:-1]):
        if location[position - 1 : position] == ("embedder",):
            group = _EMBEDDERS[str(part)]
        elif isinstance(part, str) and group is not None and part in group.model_fields:
            group = _INSIDE.get(part) or _optional(group.model_fields[part].annotation)
    return f"; valid are {', '.join(group.model_fields)}" if group is not None else ""


_INSIDE: dict[str, type[_Group]] = {
    "upstreams": Upstream,
    "tenants": Tenant,
    "rules": CategoryRule,
    "categories": CategoryRules,
}
"""Groups that stand in lists and tables, by the key of the list."""
_EMBEDDERS: dict[str, type[_Group]] = {"local": LocalEmbedder, "openai": OpenaiEmbedder, "none": NoEmbedder}


def _optional(annotation: Any) -> type[_Group] | None:
    options = (annotation, *getattr(annotation, "__args__", ()))
    return next((item for item in options if isinstance(item, type) and issubclass(item, _Group)), None)
