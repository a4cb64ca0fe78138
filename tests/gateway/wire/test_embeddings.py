from __future__ import annotations

from typing import Any

import pytest

from gateway.wire import BrokenStream, Verdict
from gateway.wire.embeddings import EmbeddingsWire
from policies.reasons import NotStored

WIRE = EmbeddingsWire()


def answer(*vectors: Any) -> dict[str, Any]:
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "usage": {"prompt_tokens": 4, "total_tokens": 4}}


@pytest.mark.parametrize(
    ("whole", "refusal"),
    [
        (answer([0.5, 1]), None),
        (answer("AACAPw=="), None),
        (answer([0.5], []), NotStored.EMPTY),
        (answer(""), NotStored.EMPTY),
        (answer(), NotStored.EMPTY),
        (answer([0.5, None]), NotStored.MALFORMED),
        (answer(None), NotStored.MALFORMED),
        ({"data": [1]}, NotStored.MALFORMED),
        ({}, NotStored.MALFORMED),
        ([], NotStored.MALFORMED),
        ({"error": {"message": "x"}}, NotStored.ERROR_STATUS),
    ],
)
def test_only_whole_vectors_are_kept(whole: Any, refusal: NotStored | None) -> None:
    assert WIRE.inspect(whole).refusal is refusal


def test_the_tokens_of_the_input_are_counted() -> None:
    assert WIRE.inspect(answer([0.5])) == Verdict(None, 4, 0)


def test_there_is_no_stream() -> None:
    with pytest.raises(BrokenStream):
        WIRE.merge([b"{}"])
    with pytest.raises(BrokenStream):
        WIRE.replay(b"{}", include_usage=False)
