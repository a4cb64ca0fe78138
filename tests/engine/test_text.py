"""Text comes out whole: characters are never cut, stop strings never shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from engine.checkpoint import BUNDLED
from engine.stops import StopMatcher
from engine.tokenizer import UNFINISHED, ByteDetokenizer, ChatTokenizer, Detokenizer, load_tokenizer


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


Both = Detokenizer | ByteDetokenizer


def both(pieces: Sequence[bytes]) -> tuple[Both, Both]:
    return Detokenizer(ByteVocabulary(pieces).decode), ByteDetokenizer(pieces)


@given(st.text(max_size=30), st.lists(st.integers(0, 200), max_size=30))
@example("a😀é漢字b", list(range(30)))
@settings(max_examples=150)
def test_text_in_any_pieces_comes_out_the_same(text: str, cuts: list[int]) -> None:
    pieces = cut(text.encode(), cuts)
    for detokenizer in both(pieces):
        shown = [detokenizer.push(i) for i in range(len(pieces))]
        assert "".join(shown) + detokenizer.flush() == text
        assert all(UNFINISHED not in piece for piece in shown) or UNFINISHED in text


@given(st.binary(max_size=60), st.lists(st.integers(0, 200), max_size=60))
@example(b"\x80" * 50, list(range(50)))
@example(b"\xf0\x9f\x98" * 15 + "é".encode(), list(range(60)))
@settings(max_examples=150)
def test_broken_bytes_come_out_as_the_decoder_says(data: bytes, cuts: list[int]) -> None:
    pieces = cut(data, cuts)
    for detokenizer in both(pieces):
        shown = "".join(detokenizer.push(i) for i in range(len(pieces))) + detokenizer.flush()
        assert shown == decode_bytes(pieces)


class Counting:
    """Counts the tokens it decodes; negative ones are bytes that belong to no character."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return decode_bytes([b"x" if i > 0 else b"\x80" for i in ids])


@pytest.mark.parametrize("token", [5, -5])
def test_a_token_costs_the_same_however_long_the_answer_is(token: int) -> None:
    """Also where no character ever becomes complete."""
    counted = Counting()
    detokenizer = Detokenizer(counted.decode)
    text = "".join(detokenizer.push(token) for _ in range(5000)) + detokenizer.flush()
    assert len(text) == 5000
    assert counted.decoded < 5000 * 50


@pytest.fixture(scope="module")
def bundled() -> ChatTokenizer:
    return load_tokenizer(BUNDLED)


TOKENS = st.lists(st.integers(0, 4095), max_size=40)


@given(TOKENS)
@settings(max_examples=150)
def test_any_tokens_come_out_as_the_library_decodes_them(bundled: ChatTokenizer, ids: list[int]) -> None:
    library = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    for detokenizer in (bundled.detokenizer(), Detokenizer(bundled.decode)):
        shown = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert shown == library.decode(ids, skip_special_tokens=True) == bundled.decode(ids)
    assert isinstance(bundled.detokenizer(), ByteDetokenizer)


def test_real_text_comes_out_whole(bundled: ChatTokenizer) -> None:
    text = "“Señor, ¿qué?” — 漢字と仮名 \N{FAMILY} e\u0301 🏳️‍🌈 \r\n\t" * 20
    detokenizer = bundled.detokenizer()
    shown = [detokenizer.push(token) for token in bundled.encode_text(text)]
    assert "".join(shown) + detokenizer.flush() == text
    assert not any(UNFINISHED in piece for piece in shown)


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(("<|end|>漢\u0301<|user|> x", "a<|end|>")))
@settings(max_examples=200)
def test_tokens_stand_where_the_library_says(bundled: ChatTokenizer, text: str) -> None:
    library = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(text, add_special_tokens=False)
    ids, offsets = bundled.encode_rendered(text)
    assert (ids, offsets.tolist()) == (library.ids, [list(span) for span in library.offsets])


def test_tokens_are_spelled_with_their_bytes(bundled: ChatTokenizer) -> None:
    tokens = bundled.encode_text("漢")
    spelled = [bundled.spelled(token) for token in tokens]
    assert b"".join(data or b"" for _, data in spelled).decode() == "漢"
    assert bundled.spelled(bundled.eos_id or 0)[0] == "<|end|>"
    assert bundled.silent(bundled.eos_id or 0)
    assert not bundled.silent(tokens[0])


def sentencepiece(directory: Path) -> ChatTokenizer:
    """A vocabulary of another kind: spaces are marked, unknown characters fall back to bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hello", "▁world", "!"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


@given(st.lists(st.sampled_from(["▁hello", "▁world", "!", "é", "😀"]), max_size=20))
@settings(max_examples=50)
def test_vocabularies_with_byte_fallback(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    tokenizer = sentencepiece(tmp_path_factory.mktemp("sentencepiece"))
    ids: list[int] = []
    for word in words:
        known = {"▁hello": 257, "▁world": 258, "!": 259}.get(word)
        ids += [1 + byte for byte in word.encode()] if known is None else [known]
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.push(token) for token in ids]
    assert "".join(shown) + detokenizer.flush() == tokenizer.decode(ids)
    assert not any(UNFINISHED in piece for piece in shown)
    assert tokenizer.encode_rendered("!!")[1].tolist() == [[0, 1], [1, 2]]


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
