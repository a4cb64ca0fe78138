"""Imports go one way, every error is mapped, every setting and reason is documented."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from gateway import errors
from gateway.settings import Settings
from policies.reasons import Bypass, Miss, NotStored

ROOT = Path(__file__).parents[1]
PACKAGES = ("gateway", "policies", "cachestore", "engine", "loadtest")
ALLOWED = {
    "policies": set(),
    "cachestore": {"policies"},
    "engine": {"policies", "cachestore.kv"},
    "gateway": {"policies", "cachestore"},
    "loadtest": {"gateway", "policies", "cachestore", "engine"},
}
HEAVY = {"torch", "transformers", "safetensors"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        for name in imports(path):
            top = name.partition(".")[0]
            if top not in PACKAGES or top == package:
                continue
            allowed = any(name == prefix or name.startswith(f"{prefix}.") for prefix in ALLOWED[package])
            assert allowed or (name == "cachestore" and "cachestore.kv" in ALLOWED[package]), f"{path}: {name}"
            assert not (package == "gateway" and name.startswith("cachestore.kv")), f"{path}: {name}"


@pytest.mark.parametrize("package", ["gateway", "policies", "cachestore"])
def test_no_torch_outside_the_engine(package: str) -> None:
    for path in sources(package):
        if path.is_relative_to(ROOT / "cachestore" / "kv"):
            continue
        assert not HEAVY & {name.partition(".")[0] for name in imports(path)}, path


def test_policies_are_pure() -> None:
    forbidden = {"asyncio", "time", "random", "socket", "os", "threading", "logging", "sqlite3"}
    for path in sources("policies"):
        assert not forbidden & {name.partition(".")[0] for name in imports(path)}, path


def test_the_gateway_process_has_no_torch() -> None:
    program = (
        "import sys, gateway.cli, gateway.server; print(sorted({'torch', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_embedder_reports_to_nobody(tmp_path: Path) -> None:
    program = "import gateway.embedding.minilm, onnxruntime; onnxruntime.InferenceSession"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def members(base: type[Any]) -> Iterator[type[Any]]:
    for child in base.__subclasses__():
        yield child
        yield from members(child)


def test_every_error_is_mapped_to_http() -> None:
    found = list(members(errors.ApiError))
    assert len(found) > 10
    for error in found:
        assert 400 <= error.status < 600
        assert re.fullmatch(r"[a-z_]+", error.type)
        assert re.fullmatch(r"[a-z_]+", error.code)
    assert len({error.code for error in found}) == len(found)


def setting_names(group: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in group.model_fields.items():
        yield f"{prefix}{name}"
        for inner in groups(field.annotation):
            yield from setting_names(inner, f"{prefix}{name}.")


def groups(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from groups(inner)


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    missing = [name for name in setting_names(Settings) if f"`{name}`" not in text]
    assert missing == []


def test_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    missing = [reason for reasons in (Miss, Bypass, NotStored) for reason in reasons if f"`{reason}`" not in text]
    assert missing == []


def test_the_documents_name_files_that_exist() -> None:
    for document in (ROOT / "docs" / "architecture.md", ROOT / "README.md"):
        for name in re.findall(
            r"`((?:gateway|policies|cachestore|engine|loadtest|docs|tests)/[\w/.]+\.\w+)`", document.read_text()
        ):
            assert (ROOT / name).exists(), f"{document.name}: {name}"
