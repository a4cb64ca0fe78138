"""Finding stored runs in prompts, and cutting prompts into chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import BUNDLED
from engine.reuse.cutting import Cutter
from engine.reuse.finding import Marks, Run, RunIndex, marked_spans, text_parts, token_spans
from engine.tokenizer import load_tokenizer

WIDTH = 4
few = st.lists(st.integers(0, 3), max_size=40)
"""Few different tokens, so that runs meet by chance and blocks repeat."""


def index_of(*chunks: list[int]) -> RunIndex:
    index = RunIndex(WIDTH)
    for name, chunk in enumerate(chunks):
        index.add(name, chunk)
    return index


@settings(max_examples=200)
@given(st.lists(few, max_size=4), few, st.integers(0, 10))
def test_what_is_found_is_there_in_order_and_apart(chunks: list[list[int]], prompt: list[int], first: int) -> None:
    end = first
    for run in index_of(*chunks).find(prompt, first):
        assert isinstance(run.name, int)
        assert run.start >= end
        assert run.stop - run.start >= WIDTH
        held = chunks[run.name][run.offset : run.offset + run.stop - run.start]
        assert held == prompt[run.start : run.stop]
        end = run.stop


@settings(max_examples=200)
@given(st.data())
def test_a_run_of_any_chunk_is_found_whole_wherever_it_is_cut(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2 * WIDTH, 30), min_size=1, max_size=4))
    chunks = [[100 * name + token for token in range(size)] for name, size in enumerate(sizes)]
    prompt: list[int] = [9000]
    expected = []
    for name in data.draw(st.permutations(range(len(chunks)))):
        length = data.draw(st.integers(2 * WIDTH - 1, len(chunks[name])))
        offset = data.draw(st.integers(0, len(chunks[name]) - length))
        expected.append(Run(name, len(prompt), len(prompt) + length, offset))
        prompt += [*chunks[name][offset : offset + length], *([9001] * data.draw(st.integers(0, 3)))]
    assert list(index_of(*chunks).find(prompt)) == expected


@settings(max_examples=100)
@given(st.lists(few, min_size=1, max_size=4), few)
def test_what_is_removed_is_found_no_more(chunks: list[list[int]], prompt: list[int]) -> None:
    index = index_of(*chunks)
    index.check()
    index.remove(0)
    index.check()
    assert all(run.name != 0 for run in index.find(prompt))
    for name in range(1, len(chunks)):
        index.remove(name)
    assert len(index) == 0
    assert index.find(prompt) == ()
    index.check()


def test_of_several_runs_the_longest_is_taken() -> None:
    shared = [1, 2, 3, 4]
    index = index_of([*shared, 7, 7], [*shared, 5, 6, 7, 8])
    assert index.find([*shared, 5, 6, 7, 8]) == (Run(1, 0, 8, 0),)


def test_equal_hashes_of_other_tokens_are_no_hit() -> None:
    forged = [0, 0, 1, -0x9E3779B97F4A7C15 % 2**64]  # the polynomial's next to last term grows by what the last loses
    index = index_of([0, 0, 0, 0])
    assert index.find([0, 0, 0, 0]) == (Run(0, 0, 4, 0),)
    assert index.find(forged) == ()
    assert index_of(forged).find(forged) == (Run(0, 0, 4, 0),)


def test_a_name_stands_for_one_chunk() -> None:
    index = index_of([1, 2, 3, 4])
    index.add(0, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="names another chunk"):
        index.add(0, [1, 2, 3, 5])
    index.check()


def test_marks() -> None:
    tagged = Marks(tags=("document",), separators=("\n---\n",))
    text = 'Look: <document id="1">one</document>\n<document>two\n---\nthree</document> which?'
    assert [text[a:b] for a, b in tagged.cut(text)] == ["one", "two\n---\nthree"]
    assert [("a\n---\nb\n---\n")[a:b] for a, b in tagged.cut("a\n---\nb\n---\n")] == ["a", "b"]
    assert Marks().cut("all of it") == ((0, 9),)


def test_parts_are_found_through_the_template() -> None:
    tokenizer = load_tokenizer(BUNDLED)
    parts = ["It was the best of times, it was the worst of times. " * 3, "  Call me Ishmael. Some years ago. " * 2]
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "You answer from what you are given."},
        {"role": "user", "content": [*({"type": "text", "text": part} for part in parts), {"type": "image_url"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And the end?"},
    ]
    assert list(text_parts(messages)) == ["You answer from what you are given.", *parts, "And the end?"]
    rendered = tokenizer.render([*messages[:1], {"role": "user", "content": "\n".join(parts)}], None)
    spans = marked_spans(rendered, text_parts(messages), Marks())
    assert [rendered[a:b] for a, b in spans[1:3]] == [part.strip() for part in parts]
    assert len(spans) == 3  # what the template does not show is passed over
    ids, offsets = tokenizer.encode_rendered(rendered)
    chunks = token_spans(offsets, spans, least=12)
    assert len(chunks) == 2
    for (first, last), (start, stop) in zip(chunks, spans[1:], strict=True):
        assert start <= offsets[first][0] <= start + 4
        assert stop - 4 <= offsets[last - 1][1] <= stop
        assert tokenizer.decode(ids[first:last]).strip() in rendered[start:stop]


def test_a_document_between_others_is_cut_to_almost_the_same_tokens() -> None:
    tokenizer = load_tokenizer(BUNDLED)
    cutter = Cutter(tokenizer, Marks(), least=32)
    document = "It was the best of times, it was the worst of times. " * 6 + "The end"
    index = RunIndex(16)
    cuts = []
    for before, after in (("Look:", "Which?"), ("A number is 1", "23 or not"), ("(", ")")):
        contents = [{"content": [{"text": text} for text in (before, document, after)]}]
        rendered: list[dict[str, object]] = [{"role": "user", "content": before + document + after}]
        cut = cutter.chat(contents, rendered, None)
        assert len(cut.spans) == 1
        cuts.append(cut)
    start, stop = cuts[0].spans[0]
    index.add("first", cuts[0].ids[start:stop])
    for cut in cuts[1:]:
        (start, stop), [run] = cut.spans[0], index.find(cut.ids)
        assert run.stop - run.start >= stop - start - 4


def test_a_bare_prompt_is_cut_at_its_marks_and_is_one_text_without() -> None:
    tokenizer = load_tokenizer(BUNDLED)
    cutter = Cutter(tokenizer, Marks(tags=("doc",)), least=8)
    one, two = ("Call me Ishmael. Some years ago. " * 3, "All happy families are alike. " * 3)
    cut = cutter.text(f"<doc>{one}</doc> <doc n='2'>{two}</doc> and?")
    assert cut.ids == tokenizer.encode_text(f"<doc>{one}</doc> <doc n='2'>{two}</doc> and?")
    texts = [tokenizer.decode(cut.ids[a:b]) for a, b in cut.spans]
    assert [text.strip() in whole for text, whole in zip(texts, (one, two), strict=True)] == [True, True]
    [(start, stop)] = cutter.text(one).spans
    assert stop - start >= len(cutter.text(one).ids) - 2
    assert cutter.text("short").spans == ()


@settings(max_examples=100)
@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True))
def test_only_tokens_cut_by_a_border_are_lost(sizes: list[int], borders: list[int]) -> None:
    offsets, end = [], 0
    for size in sizes:
        offsets.append((end, end + size))
        end += size
    ordered = sorted(borders)
    spans = list(zip(ordered[::2], ordered[1::2], strict=False))
    chunks = token_spans(np.array(offsets, np.int64).reshape(-1, 2), spans, least=1)
    taken = [offsets[first:last] for first, last in chunks]
    for start, stop in spans:
        inside = {(a, b) for a, b in offsets if start <= a < b <= stop}
        found = {(a, b) for row in taken for a, b in row if start <= a < b <= stop}
        assert found == inside
