"""The table of codecs, on a little text."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cachestore.kv.codecs import CODECS
from loadtest import kv_codecs


def test_every_codec_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    words = " ".join(f"{number} men went to mow, went to mow a meadow." for number in range(400))
    with gzip.open(tmp_path / "text" / "mow.txt.gz", "wt") as file:
        file.write(words)
    monkeypatch.setenv("HITPATH_DATA", str(tmp_path))
    arguments = ["--samples", "2", "--tokens", "48", "--following", "8", "--gate", "0"]
    assert kv_codecs.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in CODECS:
        assert f"| `{name}` |" in printed
    assert "| `raw` | 1.000 |" in printed
    assert printed.rstrip().endswith("raw")


def test_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HITPATH_DATA", str(tmp_path))
    assert kv_codecs.main([]) == 2
    assert "txt.gz" in capsys.readouterr().err
