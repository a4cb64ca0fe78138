import gzip
from pathlib import Path

import pytest

from loadtest.data import DataError, data_dir, read_rows
from loadtest.evaluate import read_pairs


def test_reads_plain_and_gzipped_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2}')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n\n{"x": 2}'))
    assert list(read_rows(tmp_path / "a.jsonl")) == list(read_rows(tmp_path / "a.jsonl.gz")) == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"x": 1}\n{"x": \n', "line 2: "), (b"{}\n[1]\n", "line 2: not an object"), (b'{"a": "\xff"}', "line 1: ")],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad.jsonl: {message}"):
        list(read_rows(path))


def test_a_damaged_archive_and_an_absent_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"x": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz"):
        list(read_rows(path))
    with pytest.raises(DataError, match="absent"):
        list(read_rows(tmp_path / "absent"))


@pytest.mark.parametrize(
    "row",
    ['{"a": "x", "b": "y"}', '{"a": "x", "b": "y", "label": 2}', '{"a": "x", "b": 1, "label": 1}', '{"label": 1}'],
)
def test_pairs_without_their_fields_are_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a": "x", "b": "y", "label": -1}\n' + row)
    with pytest.raises(DataError, match=r"pairs\.jsonl: row 2: "):
        read_pairs(path)


def test_the_data_folder_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITPATH_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("HITPATH_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="HITPATH_DATA"):
        data_dir()
