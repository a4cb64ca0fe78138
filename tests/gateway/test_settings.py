"""The settings file: closed, grouped and loud; every key of it wrong at least once."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from gateway.app import open_gateway
from gateway.cli import main
from gateway.settings import (
    CategoryRule,
    LocalEmbedder,
    NoEmbedder,
    OpenaiEmbedder,
    Settings,
    SettingsError,
    Tenant,
    Upstream,
    When,
    load,
    validate,
)
from policies.controls import Mode

SAMPLE = """
server:    {host: 127.0.0.1, port: 8080}
data_dir:  ./hitpath-data
admin:     {key_env: HITPATH_ADMIN_KEY}
upstreams:
  - {name: local, kind: bundled, model: bundled}
  - {name: pool-a, kind: vllm, url: "http://10.0.0.7:8000/v1", api_key_env: POOL_KEY, models: ["*"]}
cache:
  memory_budget: 2GiB
  log:      {kind: sqlite}
  embedder: {kind: local}
  default:  {mode: semantic, threshold: 0.90, ttl: 1d, error_budget: 0.01}
  categories:
    code:    {threshold: 0.92, ttl: 30d, quota: {min: 10%, max: 50%}}
    finance: {threshold: 0.95, ttl: 5m, max_relax: 0}
    medical: {mode: exact}
  rules:
    - {category: code, when: {system_contains: "coding assistant"}}
tenants:
  - {name: acme, key_env: ACME_KEY, rate_limit: 50/s}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "hitpath.yaml"
    path.write_text(text, "utf-8")
    return path


def fault(folder: Path, document: object) -> str:
    """What a file with this content is refused with."""
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    with pytest.raises(SettingsError) as raised:
        load(written(folder, text))
    return str(raised.value)


# --- what is right -------------------------------------------------------------------------------------------------


def test_the_documented_sample_loads(tmp_path: Path) -> None:
    settings = load(written(tmp_path, SAMPLE))
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8080)
    assert [upstream.name for upstream in settings.upstreams] == ["local", "pool-a"]
    assert settings.cache.memory_budget == 2 * 2**30
    assert settings.tenants[0].rate_limit == 50.0
    policies = settings.cache.table().policies
    assert (policies["code"].ttl, policies["code"].quota_min, policies["code"].quota_max) == (30 * 86400, 0.1, 0.5)
    assert (policies["finance"].threshold, policies["finance"].ttl) == (0.95, 300.0)
    assert policies["medical"].mode is Mode.EXACT
    assert policies["general"].threshold == 0.9


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "{}"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(written(tmp_path, text)) == Settings() == load(None)
    assert [upstream.kind for upstream in Settings().effective_upstreams()] == ["bundled"]


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_a_bare_off_is_a_mode(tmp_path: Path, text: str) -> None:
    settings = load(written(tmp_path, f"cache: {{default: {{mode: {text}}}}}"))
    assert settings.cache.default.mode is Mode.OFF
    assert not settings.cache.table().compares


# --- every key wrong once ------------------------------------------------------------------------------------------

UPSTREAM = {"name": "a", "kind": "openai", "url": "http://h/v1"}
EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    Upstream: UPSTREAM,
    Tenant: {"name": "acme", "key_env": "ACME_KEY"},
    CategoryRule: {"category": "code", "when": {"model": "m"}},
    When: {"model": "m"},
    LocalEmbedder: {"kind": "local"},
    OpenaiEmbedder: {"kind": "openai", "url": "http://h/v1", "model": "e"},
    NoEmbedder: {"kind": "none"},
}
"""The least that is valid for groups that have required keys; a new one needs a line here."""


@dataclass(frozen=True)
class Place:
    """A key or a group of the settings, and how a document comes to hold it."""

    path: tuple[str | int, ...]
    group: type[BaseModel]
    annotation: Any
    """None for the group itself."""
    around: tuple[tuple[tuple[str | int, ...], dict[str, Any]], ...] = ()
    """The examples on the way."""

    @property
    def dotted(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def id(self) -> str:
        kind = f"({self.group.__name__})" if "embedder" in self.path else ""
        return (self.dotted or "settings") + kind

    def document(self, value: Any) -> dict[str, Any]:
        """A document that is fine but for this value."""
        document: dict[str, Any] = {}
        for path, example in self.around:
            put(document, path, copy.deepcopy(example))
        put(document, self.path, value)
        return document


def put(document: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Set a value deep in a document; lists have one item."""
    here: Any = document
    for part, following in pairwise(path):
        if isinstance(here, list):
            if not here:
                here.append([] if isinstance(following, int) else {})
            here = here[0]
        else:
            here = here.setdefault(part, [] if isinstance(following, int) else {})
    if isinstance(here, list):
        here[:] = [value]
    else:
        here[path[-1]] = value


def groups_in(annotation: Any) -> Iterator[tuple[tuple[str | int, ...], type[BaseModel]]]:
    """The groups that a field holds, with what stands between them and the field."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    elif origin is typing.Annotated:
        yield from groups_in(arguments[0])
    elif origin is tuple:
        yield from (((0, *path), group) for path, group in groups_in(arguments[0]))
    elif origin is dict:
        yield from ((("code", *path), group) for path, group in groups_in(arguments[1]))
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from groups_in(argument)


def places(group: type[BaseModel] = Settings, at: Place | None = None) -> Iterator[Place]:
    """Every group and every key, found in the model itself: a new setting is covered without a word here."""
    at = at or Place((), group, None)
    yield at
    for name, field in group.model_fields.items():
        inner = list(groups_in(field.annotation))
        if not inner:
            yield Place((*at.path, name), group, field.annotation, at.around)
        for between, found in inner:
            path = (*at.path, name, *between)
            around = (*at.around, (path, EXAMPLES.get(found, {})))
            yield from places(found, Place(path, found, None, around))


KEYS = [place for place in places() if place.annotation is not None]
GROUPS = [place for place in places() if place.annotation is None]
FREE = (str, Path, str | None, Path | None)
"""Any text will do."""


def plain_text(place: Place) -> bool:
    field = place.group.model_fields[str(place.path[-1])]
    return place.annotation in FREE and not field.metadata and place.path[-1] != "category"


def test_the_walk_finds_every_kind_of_key() -> None:
    found = {place.dotted for place in KEYS}
    assert len(found) > 40
    assert found >= {
        "server.port",
        "data_dir",
        "admin.key_env",
        "upstreams.0.timeouts.first_byte",
        "upstreams.0.models",
        "cache.embedder.kind",
        "cache.embedder.threads",
        "cache.embedder.timeout",
        "cache.default.quota.min",
        "cache.categories.code.quota.max",
        "cache.rules.0.when.endpoint",
        "tenants.0.rate_limit",
    }


@pytest.mark.parametrize("place", KEYS, ids=lambda place: place.id)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, place: Place) -> None:
    said = fault(tmp_path, place.document([[1]]))
    assert f"hitpath.yaml: {place.dotted}" in said
    assert names_what_is_valid(said, place)


@pytest.mark.parametrize("place", [place for place in KEYS if not plain_text(place)], ids=lambda place: place.id)
def test_a_value_that_means_nothing_is_named(tmp_path: Path, place: Place) -> None:
    said = fault(tmp_path, place.document(";nonsense"))
    assert f"hitpath.yaml: {place.dotted}" in said
    assert names_what_is_valid(said, place)
    assert ";nonsense" in said or "should be one of" in said


VALID = ("should be", "such as", "is not one of", "does not match", "write it as", "not a valid path")


def names_what_is_valid(said: str, place: Place) -> bool:
    line = next(line for line in said.splitlines() if place.dotted in line)
    told = line.partition(f"{place.dotted}")[2].partition(": ")[2]
    return any(word in told for word in VALID)


@pytest.mark.parametrize("place", GROUPS, ids=lambda place: place.id)
def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path, place: Place) -> None:
    unknown = Place((*place.path, "treshold"), place.group, None, place.around)
    said = fault(tmp_path, unknown.document(1))
    valid = ", ".join(place.group.model_fields)
    assert said.endswith(f"hitpath.yaml: {unknown.dotted}: unknown key; valid are {valid}")


@pytest.mark.parametrize("place", [place for place in GROUPS if place.path], ids=lambda place: place.id)
@pytest.mark.parametrize("value", ["text", 5, [1]], ids=["text", "number", "list"])
def test_a_group_that_is_none_is_named(tmp_path: Path, place: Place, value: object) -> None:
    assert f"hitpath.yaml: {place.dotted}" in fault(tmp_path, place.document(value))


REQUIRED = [place for place in KEYS if place.group.model_fields[str(place.path[-1])].is_required()]


@pytest.mark.parametrize("place", REQUIRED, ids=lambda place: place.id)
def test_a_missing_key_is_named(tmp_path: Path, place: Place) -> None:
    document = place.document(None)
    here: Any = document
    for part in place.path[:-1]:
        here = here[part]
    del here[place.path[-1]]
    said = fault(tmp_path, document)
    assert f"hitpath.yaml: {place.dotted}" in said or "needs at least one condition" in said or "'kind'" in said


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"server": {"port": 65536}}, "server.port: Input should be less than or equal to 65535, got 65536"),
    ({"server": {"port": -1}}, "server.port: Input should be greater than or equal to 0, got -1"),
    ({"server": {"port": 80.5}}, "server.port: Input should be a valid integer"),
    ({"server": {"max_body": "32 MegaBytes"}}, "server.max_body: '32 MegaBytes' has the unknown unit 'MegaBytes'"),
    ({"server": {"max_body": -1}}, "server.max_body: -1 is not a size such as 512MiB, 2GiB"),
    ({"cache": {"memory_budget": "2G"}}, "cache.memory_budget: '2G' has the unknown unit 'G'; sizes end in one of B,"),
    ({"cache": {"default": {"ttl": "1 day"}}}, "cache.default.ttl: '1 day' has the unknown unit 'day'"),
    ({"cache": {"default": {"ttl": True}}}, "cache.default.ttl: True is not a duration such as 30s"),
    ({"cache": {"default": {"ttl": float("nan")}}}, "cache.default.ttl: nan is not a duration"),
    ({"cache": {"default": {"ttl": float("inf")}}}, "cache.default.ttl: inf is not a duration"),
    ({"cache": {"default": {"threshold": 90}}}, "cache.default.threshold: Input should be less than or equal to 1"),
    ({"cache": {"default": {"threshold": float("nan")}}}, "cache.default.threshold: Input should be "),
    ({"cache": {"default": {"error_budget": -0.1}}}, "cache.default.error_budget: Input should be greater than or"),
    (
        {"cache": {"default": {"mode": "fuzzy"}}},
        "cache.default.mode: Input should be 'off', 'exact' or 'semantic', got",
    ),
    (
        {"cache": {"categories": {"code": {"quota": {"min": "150%"}}}}},
        "cache.categories.code.quota.min: '150%' is more",
    ),
    ({"cache": {"log": {"kind": "redis"}}}, "cache.log.kind: Input should be 'sqlite', got 'redis'"),
    (
        {"cache": {"embedder": {"kind": "cohere"}}},
        "cache.embedder.kind: should be one of local, openai, none",
    ),
    ({"cache": {"embedder": {"kind": "local", "threads": 0}}}, "cache.embedder.threads: Input should be greater than"),
    ({"cache": {"categories": {"a b": {}}}}, "cache.categories.a b.[key]: 'a b' does not match"),
    ({"upstreams": [{**UPSTREAM, "url": "10.0.0.7:8000/v1"}]}, "upstreams.0.url: '10.0.0.7:8000/v1' does not match"),
    ({"upstreams": [{**UPSTREAM, "url": "ftp://h/v1"}]}, "upstreams.0.url: 'ftp://h/v1' does not match ^https?://"),
    ({"upstreams": [{**UPSTREAM, "kind": "ollama"}]}, "upstreams.0.kind: Input should be 'bundled', 'openai', 'vllm'"),
    ({"upstreams": [UPSTREAM, {**UPSTREAM, "name": "-b"}]}, "upstreams.1.name: '-b' does not match"),
    ({"upstreams": UPSTREAM}, "upstreams: Input should be a valid tuple"),
    (
        {"tenants": [{"name": "a", "key_env": "A", "rate_limit": 50}]},
        "tenants.0.rate_limit: 50 is not a rate; write it",
    ),
    ({"tenants": [{"name": "a", "key_env": "A", "rate_limit": "0/s"}]}, "tenants.0.rate_limit: '0/s' is not a rate"),
    ({"treshold": 0.9}, "treshold: unknown key; valid are server, data_dir, admin, upstreams, cache, tenants"),
]


@pytest.mark.parametrize(("document", "expected"), WRONG, ids=[expected.partition(": ")[0] for _, expected in WRONG])
def test_a_wrong_value_is_named_with_what_would_be_right(
    tmp_path: Path, document: dict[str, Any], expected: str
) -> None:
    assert f"hitpath.yaml: {expected}" in fault(tmp_path, document)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (
        {"upstreams": [{"name": "a", "kind": "bundled", "url": "http://h/v1"}]},
        "upstreams.0.url: kind bundled takes no url: the gateway starts this engine itself",
    ),
    (
        {"upstreams": [{"name": "a", "kind": "vllm"}]},
        "upstreams.0.url: kind vllm needs a url such as http://10.0.0.7:8000/v1",
    ),
    (
        {"upstreams": [{"name": "a", "kind": "vllm", "url": "http://h/v1", "flags": ["--x"]}]},
        "upstreams.0.flags: kind vllm takes no flags: the gateway does not start it",
    ),
    (
        {"upstreams": [{"name": "a", "kind": "bundled", "flags": ["--reuse", "off", "--port=80"]}]},
        "upstreams.0.flags: --port is the gateway's to set",
    ),
    ({"upstreams": [UPSTREAM, UPSTREAM]}, "upstreams: the name 'a' is used twice"),
    (
        {"tenants": [{"name": "acme", "key_env": "A"}, {"name": "acme", "key_env": "B"}]},
        "tenants: the name 'acme' is used twice",
    ),
    (
        {"cache": {"default": {"quota": {"min": "60%", "max": "50%"}}}},
        "cache.default.quota.min: 60% is above max, which is 50%",
    ),
    (
        {"cache": {"categories": {name: {"quota": {"min": "40%"}} for name in ("code", "finance", "travel")}}},
        "cache.categories: the quotas' min shares add up to 120%, more than the whole",
    ),
    ({"cache": {"embedder": {"threads": 2}}}, "cache.embedder.kind: should be one of local, openai, none"),
    (
        {"cache": {"default": {"quota": {"min": "20%"}}}},
        "cache.categories: the quotas' min shares add up to 180%, more than the whole",
    ),
    (
        {"cache": {"rules": [{"category": "cod", "when": {"model": "m"}}]}},
        "cache.rules.0.category: 'cod' is not one of assistant, code, conversation,",
    ),
    (
        {"cache": {"rules": [{"category": "code", "when": {}}]}},
        "cache.rules.0.when: needs at least one condition of system_contains, user_contains, model, ",
    ),
]


@pytest.mark.parametrize(("document", "expected"), IMPOSSIBLE)
def test_an_impossible_pair_is_named(tmp_path: Path, document: dict[str, Any], expected: str) -> None:
    assert f"hitpath.yaml: {expected}" in fault(tmp_path, document)


def test_every_fault_has_a_line_of_its_own(tmp_path: Path) -> None:
    lines = fault(tmp_path, {"server": {"port": "x", "hots": "h"}, "data_dir": [1]}).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["server.port", "server.hots", "data_dir"]
    assert all(line.startswith(f"{tmp_path}/hitpath.yaml: ") for line in lines)


FILES = [
    ("server: {port: 1}\nserver: {port: 2}\n", r"hitpath\.yaml: is not YAML: .*'server' is given twice.*line 2"),
    ("cache:\n  default: {ttl: 1d, mode: exact, ttl: 2d}\n", r"'ttl' is given twice(.|\n)*line 2, column"),
    ("server: {port: 1", r"hitpath\.yaml: is not YAML: .*line 1"),
    ("\tserver: 1", r"hitpath\.yaml: is not YAML"),
    ("data_dir: 2026-13-45", r"hitpath\.yaml: is not YAML"),
    ("data_dir: !!python/object:os.system x", r"hitpath\.yaml: is not YAML: could not determine a constructor"),
    ("? [a, b]\n: 1\n", r"hitpath\.yaml: is not YAML"),
    ("[" * 5000, r"hitpath\.yaml: is not YAML"),
    ("- server", r"hitpath\.yaml: must be a mapping of server, data_dir, admin, upstreams, cache, tenants"),
    ("just text", r"hitpath\.yaml: must be a mapping of server, data_dir"),
    ("1: 2", r"hitpath\.yaml: 1: "),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=range(len(FILES)))
def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=rf"(?s){expected}"):
        load(written(tmp_path, text))


def test_bytes_that_are_no_text_say_so(tmp_path: Path) -> None:
    path = tmp_path / "hitpath.yaml"
    path.write_bytes(b"\xff\xfe\x00server")
    with pytest.raises(SettingsError, match="is not YAML"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.yaml: cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"upstreams": [{**UPSTREAM, "api_key_env": "NOT_SET"}]}, "upstreams.a.api_key_env"),
        ({"tenants": [{"name": "acme", "key_env": "NOT_SET"}]}, "tenants.acme.key_env"),
        (
            {"cache": {"embedder": {"kind": "openai", "url": "http://h/v1", "model": "e", "api_key_env": "NOT_SET"}}},
            "cache.embedder.api_key_env",
        ),
    ],
)
async def test_an_unset_variable_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], expected: str
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    settings = validate({"data_dir": tmp_path, "upstreams": [UPSTREAM], **document}, source="test")
    with pytest.raises(SettingsError, match=f"^{expected}: the environment variable NOT_SET is not set$"):
        async with open_gateway(settings):
            pass


# --- the command line ----------------------------------------------------------------------------------------------


def test_config_check_says_that_a_file_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(written(tmp_path, SAMPLE))]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/hitpath.yaml: fine\n", "")


@pytest.mark.parametrize("command", [["config", "check"], ["config", "show", "--config"], ["serve", "--config"]])
def test_a_bad_file_ends_every_command_with_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    path = written(tmp_path, "server: {port: x, hots: y}")
    assert main([*command, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.startswith(f"hitpath: {path}: server.") for line in err.splitlines()] == [True, True]


def test_a_wrong_command_line_ends_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["config"], ["config", "check"], ["nonsense"], ["config", "show", "--port", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "usage: hitpath" in capsys.readouterr().err


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> Settings:
    assert main(["config", "show", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return validate(yaml.safe_load(out), source="shown")


def assert_same_effect(one: Settings, other: Settings) -> None:
    assert one.document() == other.document()
    assert one.cache.table().policies == other.cache.table().policies
    assert one.tenants == other.tenants


def test_what_is_shown_can_be_loaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SAMPLE)
    assert_same_effect(shown(capsys, "--config", str(path)), load(path))
    assert_same_effect(shown(capsys), Settings())
    odd = SAMPLE.replace("mode: exact", "mode: off").replace("{kind: local}", "{kind: none}")
    for rate in ("1000/h", "1/d", "5000000/s"):
        path = written(tmp_path, odd.replace("50/s", rate))
        assert_same_effect(shown(capsys, "--config", str(path)), load(path))


def test_the_command_line_goes_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SAMPLE)
    options = ["--port", "9000", "--uds", "/run/h.sock", "--data-dir", "/var/h", "--upstream", "https://k:p@h:1/v1"]
    settings = shown(capsys, "--config", str(path), *options)
    assert (settings.server.host, settings.server.port, settings.server.uds) == ("127.0.0.1", 9000, Path("/run/h.sock"))
    assert settings.data_dir == Path("/var/h")
    assert [(up.name, up.kind, up.url) for up in settings.upstreams] == [("h:1", "openai", "https://k:p@h:1/v1")]
    original = load(path).document()
    changed = settings.document()
    assert {name for name in original if original[name] != changed[name]} == {"server", "data_dir", "upstreams"}


def test_the_command_line_alone_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    settings = shown(capsys, "--host", "::1", "--port", "0", "--upstream", "http://[::1]:8000/v1")
    assert (settings.server.host, settings.server.port) == ("::1", 0)
    assert settings.upstreams[0].url == "http://[::1]:8000/v1"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--port", "99999"], "server.port: Input should be less than or equal to 65535"),
        (["--upstream", "h:8000"], "--upstream: 'h:8000' is not a URL such as http://127.0.0.1:8000/v1"),
        (["--upstream", "ftp://h/v1"], "--upstream: 'ftp://h/v1' is not a URL"),
        (["--config", "absent.yaml"], "absent.yaml: cannot be read"),
    ],
)
def test_a_wrong_option_is_named(capsys: pytest.CaptureFixture[str], options: list[str], expected: str) -> None:
    assert main(["config", "show", *options]) == 2
    assert expected in capsys.readouterr().err
