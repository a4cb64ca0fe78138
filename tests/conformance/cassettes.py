"""Recorded exchanges with the real API, read straight from the archive in the data directory."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

_REPOSITORY = Path(__file__).parents[2]
_CONNECTION = frozenset({"alt-svc", "connection", "content-length", "date", "server", "transfer-encoding"})
_ENDPOINT = re.compile(r"/(chat/completions|completions|embeddings|responses)$")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One recorded request and its answer; header names are lower case, several values joined by a comma."""

    name: str
    method: str
    path: str
    """Without scheme, host and query, `/v1/…` for the API's own host."""
    request_headers: Mapping[str, str]
    request_body: bytes
    status: int
    response_headers: Mapping[str, str]
    response_body: bytes

    @property
    def endpoint(self) -> str | None:
        """The name of the cached endpoint, None for the others."""
        found = _ENDPOINT.search(self.path)
        return None if found is None else found[1].split("/")[0]

    @property
    def headers_to_send(self) -> dict[str, str]:
        """The answer's headers that are still true when it is served again: nothing of the recorded connection."""
        return {name: value for name, value in self.response_headers.items() if name not in _CONNECTION}

    @property
    def streams(self) -> bool:
        """Whether the answer is an event stream."""
        return self.response_headers.get("content-type", "").startswith("text/event-stream")


def archive() -> Path:
    """Give the place of the recordings, whether or not they are there."""
    data = os.environ.get("HITPATH_DATA")
    root = Path(data) if data else _REPOSITORY.parent / "shared" / "data"
    return root / "conformance" / "openai_cassettes.tar.gz"


@cache
def cassettes() -> tuple[Exchange, ...]:
    """Read every recording, sorted by name; none when the data directory is absent."""
    if not archive().exists():
        return ()
    with tarfile.open(archive()) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".yaml")}
        return tuple(
            _exchange(name, number, interaction)
            for name, file in sorted(files.items())
            if file is not None
            for number, interaction in enumerate(_load(file.read())["interactions"])
        )


def parameters(chosen: Callable[[Exchange], bool]) -> list[Any]:
    """Give the chosen exchanges as pytest parameters, by name; one that skips when there are no recordings."""
    if not cassettes():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no recordings at {archive()} (set HITPATH_DATA)"))]
    return [pytest.param(exchange, id=exchange.name) for exchange in cassettes() if chosen(exchange)]


def _load(text: bytes) -> Any:
    # The pure Python loader takes seconds for the recorded vectors.
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _exchange(file: str, number: int, interaction: dict[str, Any]) -> Exchange:
    request, response = interaction["request"], interaction["response"]
    stem = PurePosixPath(file).stem
    return Exchange(
        name=stem if number == 0 else f"{stem}-{number}",
        method=request["method"],
        path=urlsplit(request["url"]).path,
        request_headers=_headers(request["headers"]),
        request_body=(request["body"] or "").encode(),
        status=response["code"],
        response_headers=_headers(response["headers"]),
        response_body=response["body"].encode(),
    )


def _headers(recorded: dict[str, list[str]]) -> dict[str, str]:
    return {name.lower(): ", ".join(values) for name, values in recorded.items()}
