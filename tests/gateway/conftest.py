"""Fixtures for tests of a whole gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.embedding.local import load
from tests.fakes import ScriptedUpstream
from tests.gateway.harness import Client, serving, settings_for


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in whose cache the embedder's file is built."""
    data_dir = tmp_path_factory.mktemp("embedder")
    load(data_dir)
    return data_dir


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def client(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(settings_for(tmp_path, upstream)) as client:
        yield client
