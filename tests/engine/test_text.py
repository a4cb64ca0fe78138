"""Text comes out whole: characters are never cut, stop strings never shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.stops import StopMatcher
from engine.tokenizer import Detokenizer


def decode_bytes(pieces: Sequence[bytes]) -> str:
    return b"".join(pieces).decode(errors="replace")


class ByteVocabulary:
    """Tokens are pieces of bytes, cut anywhere."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return decode_bytes([self._pieces[i] for i in ids])


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@given(st.text(max_size=30), st.lists(st.integers(0, 200), max_size=30))
@example("a😀é漢字b", list(range(30)))
@settings(max_examples=150)
def test_text_in_any_pieces_comes_out_the_same(text: str, cuts: list[int]) -> None:
    pieces = cut(text.encode(), cuts)
    detokenizer = Detokenizer(ByteVocabulary(pieces).decode)
    shown = [detokenizer.push(i) for i in range(len(pieces))]
    assert "".join(shown) + detokenizer.flush() == text
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text


@given(st.binary(max_size=30), st.lists(st.integers(0, 200), max_size=30))
@settings(max_examples=150)
def test_broken_bytes_come_out_as_the_decoder_says(data: bytes, cuts: list[int]) -> None:
    pieces = cut(data, cuts)
    detokenizer = Detokenizer(ByteVocabulary(pieces).decode)
    shown = "".join(detokenizer.push(i) for i in range(len(pieces))) + detokenizer.flush()
    assert shown == decode_bytes(pieces)


alphabet = st.text(alphabet="abé", max_size=12)


@given(st.lists(alphabet, max_size=10), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300)
def test_stop_strings_cut_wherever_they_lie(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text, shown, stopped = "".join(pieces), "", False
    for piece in pieces:
        new, stopped = matcher.push(piece)
        shown += new
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    if stopped:
        assert not any(stop in shown for stop in stops)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


def test_text_that_cannot_begin_a_stop_is_shown_at_once() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("hello E") == ("hello ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("X") == ("ENX", False)
    assert matcher.push("..END..") == ("..", True)
