"""The training script of the bundled model, on a book of nonsense."""

from __future__ import annotations

import itertools
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from engine.checkpoint import load_checkpoint
from loadtest.training import bundled
from loadtest.training.samples import ANSWER_LIMIT, IGNORE, Samples, Specials
from loadtest.training.scaffold import Scaffold, followed

SPECIALS = Specials(*range(1, 6))


@pytest.fixture(scope="module")
def book() -> str:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmno", k=draw.randint(2, 8))) for _ in range(300)]

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(4, 30))).capitalize() + draw.choice(".!?")

    return "\n\n".join(" ".join(sentence() for _ in range(8)) for _ in range(60))


@pytest.fixture(scope="module")
def tokenizer(book: str) -> Tokenizer:
    return bundled.train_tokenizer(book)


def samples(book: str, tokenizer: Tokenizer, seed: int = 0) -> Samples:
    return Samples(book, tokenizer, SPECIALS, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", ["book", "repeat", "quotes", "facts", "chats", "endings", "long_chat"])
def test_rows_are_full_and_targets_are_the_next_tokens_or_the_end(kind: str, book: str, tokenizer: Tokenizer) -> None:
    source = samples(book, tokenizer)
    for _ in range(5):
        tokens, targets = getattr(source, kind)(256)
        assert tokens.shape == targets.shape == (256,)
        following, wanted = tokens[1:], targets[:-1]
        early = kind == "endings" and wanted == SPECIALS.end
        assert np.all((wanted == IGNORE) | (wanted == following) | early)
        assert np.any(wanted != IGNORE)


def test_every_answer_is_short_and_not_empty(book: str, tokenizer: Tokenizer) -> None:
    tokens = np.concatenate([samples(book, tokenizer, seed).chats(512)[0] for seed in range(20)]).tolist()
    starts = [i for i, token in enumerate(tokens) if token == SPECIALS.assistant]
    answers = [list(itertools.takewhile(lambda t: t != SPECIALS.end, tokens[i + 1 :])) for i in starts]
    # The row's edge cuts the last answer of each; what follows it there is another row.
    assert sum(len(answer) > ANSWER_LIMIT for answer in answers) <= 20
    assert all(answers)
    assert len({tuple(answer) for answer in answers}) > len(answers) / 2


@pytest.mark.parametrize("kind", ["chats", "endings", "facts", "long_chat"])
def test_most_rows_do_not_begin_where_a_conversation_does(book: str, tokenizer: Tokenizer, kind: str) -> None:
    made = samples(book, tokenizer)
    rows = [getattr(made, kind)(512)[0].tolist() for _ in range(60)]
    assert sum(row[0] == SPECIALS.begin for row in rows) <= 15
    assert not any(SPECIALS.begin in row[1:] for row in rows)


def test_a_seed_gives_the_same_rows(book: str, tokenizer: Tokenizer) -> None:
    first, second = (samples(book, tokenizer, seed=3).chats(256)[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_a_short_run_learns_and_writes_a_checkpoint(
    book: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It computes in bfloat16 whatever the processor; five of its iterations take two minutes where that is emulated.
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=1))
    torch.manual_seed(0)
    phases = (bundled.Phase(12, 128, 2, {"book": 0.5, "chats": 0.5}),)
    model = bundled.new_model()
    held_out = [torch.from_numpy(part)[None] for part in samples(book, tokenizer, seed=9).book(128)]
    before = bundled.loss_of(model, held_out[0], held_out[1]).item()
    bundled.train(model, samples(book, tokenizer), np.random.default_rng(0), phases)
    assert bundled.loss_of(model, held_out[0], held_out[1]).item() < before
    bundled.save(model, tokenizer, tmp_path)
    loaded = load_checkpoint(tmp_path, name="bundled")
    assert loaded.eos_ids == {SPECIALS.end}
    # A conversation is encoded the way it was trained on.
    ids = loaded.tokenizer.encode_chat([{"role": "user", "content": "abc"}], None)
    assert ids == [SPECIALS.begin, SPECIALS.user, *tokenizer.encode("abc").ids, SPECIALS.end, SPECIALS.assistant]


def test_the_scaffold_shows_what_followed_when_two_tokens_stood_together_last() -> None:
    rows = torch.tensor([[5, 6, 7, 5, 6, 8, 5, 6, 5], [1, 1, 1, 1, 2, 1, 1, 2, 3]])
    assert followed(rows).tolist() == [[0, 0, 0, 0, 2, 0, 0, 5, 0], [0, 0, 2, 3, 0, 0, 4, 5, 0]]


def test_the_scaffold_brings_heads_to_look_where_they_should(book: str, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = bundled.new_model()
    scaffold, row = Scaffold(model), torch.from_numpy(samples(book, tokenizer).repeat(64)[0])[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        model(row, use_cache=False)
        loss = scaffold.loss(row)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
