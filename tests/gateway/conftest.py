"""Fixtures for tests of a whole gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes import ScriptedUpstream
from tests.gateway.harness import Client, serving, settings_for


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def client(upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(settings_for(tmp_path, upstream)) as client:
        yield client
