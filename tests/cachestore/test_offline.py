from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cachestore import Filter, StoreError, StoreLocked
from cachestore.offline import entries, export_entries, import_entries, purge, stats, verify
from tests.cachestore.samples import ManualClock, digest, document, open_store, put

FAR = 4e9
"""After the end of these tests: an import compares with the real clock."""


async def filled(directory: Path) -> None:
    store = await open_store(directory)
    for n in range(10):
        await put(store, document(n, expires=FAR, category="chat" if n % 2 else "code"))
    await put(store, document("plain", expires=FAR, vector=None, scope=b"", body=bytes(range(256))))
    await store.close()


async def test_reading_beside_a_running_store(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    for n in range(5):
        await put(store, document(n))
    assert [row.id for row in entries(tmp_path, Filter(), limit=3)] == [5, 4, 3]
    assert stats(tmp_path).entries == 5
    assert stats(tmp_path).by_category["code"][0] == 5
    assert purge(tmp_path, Filter(ids=(2,)), dry_run=True) == [2]
    assert export_entries(tmp_path, io.StringIO()) == 5
    assert verify(tmp_path) == []
    for write in (lambda: purge(tmp_path, Filter()), lambda: import_entries(tmp_path, [])):
        with pytest.raises(StoreLocked, match="in use by process"):
            write()
    await store.close()


async def test_purge(tmp_path: Path) -> None:
    await filled(tmp_path)
    assert purge(tmp_path, Filter(category="chat")) == [2, 4, 6, 8, 10]
    store = await open_store(tmp_path)
    assert store.stats().entries == 6
    assert await store.check() == []
    await store.close()


def test_a_directory_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no log"):
        stats(tmp_path / "none")
    assert "holds no log" in verify(tmp_path)[0]


async def test_export_and_import_keep_everything(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    out = io.StringIO()
    assert export_entries(tmp_path / "a", out) == 11
    result = import_entries(tmp_path / "b", out.getvalue().splitlines())
    assert (result.stored, result.expired, result.problems) == (11, 0, [])
    assert verify(tmp_path / "b") == []
    again = io.StringIO()
    export_entries(tmp_path / "b", again)
    assert again.getvalue() == out.getvalue()
    store = await open_store(tmp_path / "b")
    hit = await store.get(digest("plain"))
    assert hit is not None
    assert hit.body == bytes(range(256))
    stored = document(3).vector
    assert stored is not None
    assert len(store.search(digest("scope"), stored, 1, 0.99)) == 1
    assert await store.check() == []
    await store.close()


async def test_part_of_a_log_is_exported(tmp_path: Path) -> None:
    await filled(tmp_path)
    out = io.StringIO()
    assert export_entries(tmp_path, out, Filter(category="chat")) == 5
    assert {json.loads(line)["category"] for line in out.getvalue().splitlines()} == {"chat"}


async def test_damaged_lines_are_reported_with_their_number_and_skipped(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    out = io.StringIO()
    export_entries(tmp_path / "a", out)
    good = out.getvalue().splitlines()
    line: dict[str, Any] = json.loads(good[0])
    damaged = [
        "{not json",
        "[]",
        "3",
        "[" * 100_000,
        json.dumps({name: value for name, value in line.items() if name != "key"}),
        *(
            json.dumps({**line, **change})
            for change in (
                {"key": "00"},
                {"key": 7},
                {"scope": "zz"},
                {"text": None},
                {"created": "soon"},
                {"expires": float("nan")},
                {"vector": "!!"},
                {"vector": "AAAA"},
                {"vector": "AAAAAAAAAAA="},
                {"body": 1},
                {"binary": True, "body": "*"},
            )
        ),
    ]
    result = import_entries(tmp_path / "b", [good[0], "", *damaged, good[1], json.dumps({**line, "expires": 1.0})])
    assert (result.stored, result.expired) == (2, 1)
    assert [problem.split(":")[0] for problem in result.problems] == [f"line {n}" for n in range(3, 3 + len(damaged))]
    assert verify(tmp_path / "b") == []


async def test_an_import_replaces_equal_keys(tmp_path: Path) -> None:
    await filled(tmp_path)
    out = io.StringIO()
    export_entries(tmp_path, out)
    assert import_entries(tmp_path, out.getvalue().splitlines()).stored == 11
    assert stats(tmp_path).entries == 11


async def test_lone_surrogates_become_question_marks(tmp_path: Path) -> None:
    store = await open_store(tmp_path, ManualClock())
    id_ = await put(store, replace(document("a"), text="a \ud800 b", namespace="n\udfff"))
    hit = await store.get(digest("a"))
    assert hit is not None
    assert (hit.id, hit.text) == (id_, "a ? b")
    assert await store.check() == []
    await store.close()
    assert verify(tmp_path) == []
