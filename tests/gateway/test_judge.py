"""The pair judge with the weights that ship."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.app import open_judge
from gateway.embedding.local import find_model
from gateway.judge import JudgeError
from gateway.judge.load import FOLDER, GRAPH, HEAD, load
from gateway.judge.model import MAX_CHARS, PairModel
from gateway.judge.pairjudge import MAX_WAITING, PairJudge
from gateway.judge.pairs import MARKS, TEXT_TOKENS, marks, row
from gateway.judge.words import word_table
from gateway.settings import validate
from policies.category import PAIR_THRESHOLD, CategoryPolicy
from policies.judge import Accepted, Candidate, Refused, Stage, ThresholdJudge
from policies.pairhead import PairHead
from policies.reasons import Miss

POLICY = CategoryPolicy("general", threshold=PAIR_THRESHOLD)
ASKED = "How do I reset my password?"
PARAPHRASE = "How can I reset my password?"
OTHER = "How long does it take to boil an egg?"
ODD = [
    "", " ", "?", "1" * 300, "3.14159 2.71828", "\ud800", "a\udfffb", "🙂" * 50, "كيف أعيد تعيين كلمة المرور؟",
    "abc אבג 123 דהו", "パスワードを忘れました", "for (int i = 0; i < n; i++) { a[i] *= 2; }", "x" * 100_000,
    "word " * 20_000, "\x00\x01\x02", "​‮", "<script>alert(1)</script>", "ﷺ" * 40,
]  # fmt: skip
SHORT = st.text(st.characters(), max_size=120)


@pytest.fixture(scope="module")
def loaded() -> tuple[PairModel, PairHead]:
    return load()


@pytest.fixture(scope="module")
def judge(loaded: tuple[PairModel, PairHead]) -> Iterator[PairJudge]:
    judge = PairJudge(*loaded, cosine=True)
    yield judge
    asyncio.run(judge.close())


def candidates(*texts: str, similarity: float = 0.9) -> list[Candidate]:
    return [Candidate(number, text, similarity) for number, text in enumerate(texts)]


def test_marks_say_what_the_other_question_has() -> None:
    assert marks([1, 2, 3], [1, 2, 3]) == [4, 4, 4]
    assert marks([1, 2, 3], [1, 9, 3]) == [2, 0, 3]
    assert marks([1, 2], [2, 1]) == [1, 1]
    assert marks([], [1]) == []


def test_a_row_has_both_questions_between_markers() -> None:
    laid = row([5, 6], [6], 101, 102)
    assert laid.ids == [101, 5, 6, 102, 6, 102]
    assert laid.second == 4
    assert all(0 <= mark < MARKS for mark in laid.marks)
    assert len(laid.marks) == len(laid.ids)


def test_pairs_judged_together_are_judged_as_alone(loaded: tuple[PairModel, PairHead]) -> None:
    model, _ = loaded
    texts = [PARAPHRASE, OTHER, "Where can I change the password of my account, which I have forgotten?"]
    together = model.logits(ASKED, texts)
    alone = [model.logits(ASKED, [text])[0] for text in texts]
    # int8 sums do not depend on the neighbours; what is left float does, by its last bits.
    np.testing.assert_allclose(np.array(together, float), np.array(alone, float), atol=0.05)


def test_a_paraphrase_is_accepted(judge: PairJudge) -> None:
    found = judge.decide(ASKED, candidates(PARAPHRASE, similarity=0.97), POLICY)
    assert isinstance(found, Accepted)
    assert [verdict.stage for verdict in found.verdicts] == [Stage.PAIR]
    assert judge.point(POLICY) <= found.score <= 1


def test_a_stranger_is_refused(judge: PairJudge) -> None:
    found = judge.decide(ASKED, candidates(OTHER, similarity=0.1), POLICY)
    assert isinstance(found, Refused)
    assert found.reason is Miss.JUDGE_REFUSED
    assert found.score < 0.3


def test_equal_but_for_typing_needs_no_model(judge: PairJudge) -> None:
    found = judge.decide(ASKED, candidates(OTHER, "hi, how do i reset my password, please"), POLICY)
    assert isinstance(found, Accepted)
    assert (found.candidate.id, found.score) == (1, 1.0)
    assert [verdict.stage for verdict in found.verdicts] == [Stage.SAME]


def test_a_guard_refuses_whatever_the_model_says(judge: PairJudge) -> None:
    found = judge.decide("What is 15% of 80?", candidates("What is 18% of 80?", similarity=0.99), POLICY)
    assert isinstance(found, Refused)
    (verdict,) = found.verdicts
    assert (verdict.stage, found.score) == (Stage.GUARD, 0.0)
    assert verdict.guard.startswith("numbers: ")


def test_guards_know_which_of_the_two_is_asked(judge: PairJudge) -> None:
    short, long = "Ann has 5 cats and 2 dogs. How many pets?", "Ann has 5 cats and 2 dogs and $9. How many pets?"
    (verdict,) = judge.decide(short, candidates(long, similarity=0.99), POLICY).verdicts
    assert (verdict.stage, verdict.guard) == (Stage.GUARD, "givens: - / 9.0")
    (verdict,) = judge.decide(long, candidates(short, similarity=0.99), POLICY).verdicts
    assert verdict.stage is Stage.PAIR


def test_a_later_candidate_may_serve(judge: PairJudge) -> None:
    found = judge.decide(ASKED, candidates("How do I reset 3 passwords?", OTHER, PARAPHRASE), POLICY)
    assert isinstance(found, Accepted)
    assert found.candidate.text == PARAPHRASE
    assert len(found.verdicts) == 3


def test_the_point_follows_the_budget_and_may_be_replaced(loaded: tuple[PairModel, PairHead]) -> None:
    judge = PairJudge(*loaded, cosine=True)
    strict, lax = (CategoryPolicy("general", error_budget=budget) for budget in (0.001, 0.2))
    assert judge.point(strict) > judge.point(POLICY) > judge.point(lax)
    never = PairJudge(*loaded, cosine=True, point=lambda policy: 1.1)
    assert isinstance(never.decide(ASKED, candidates(PARAPHRASE), POLICY), Refused)


def test_without_the_embedder_it_knows_it_does_without_the_cosine(loaded: tuple[PairModel, PairHead]) -> None:
    judge = PairJudge(*loaded, cosine=False)
    near, far = (judge.decide(ASKED, candidates(PARAPHRASE, similarity=value), POLICY) for value in (0.99, 0.1))
    assert near.score == far.score


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_texts_are_judged_or_declined(judge: PairJudge, odd: str) -> None:
    for text, other in ((odd, PARAPHRASE), (ASKED, odd), (odd, odd + "!")):
        found = judge.decide(text, candidates(other), POLICY)
        assert 0 <= found.score <= 1


def test_any_texts_are_judged_or_declined(judge: PairJudge) -> None:
    @settings(max_examples=100)
    @given(SHORT, SHORT)
    def judged(text: str, other: str) -> None:
        found = judge.decide(text, candidates(other), POLICY)
        assert 0 <= found.score <= 1

    judged()


def test_what_is_too_long_is_declined(judge: PairJudge) -> None:
    long = "many words " * TEXT_TOKENS
    assert len(long) > MAX_CHARS
    for text in (long, "words " * (TEXT_TOKENS + 1)):
        found = judge.decide(text, candidates(f"{text} more"), POLICY)
        assert isinstance(found, Refused)
        assert [verdict.stage for verdict in found.verdicts] == [Stage.DECLINED]


async def test_no_neighbour_is_a_reason(judge: PairJudge) -> None:
    assert await judge.judge(ASKED, [], POLICY) == Refused(Miss.NO_NEIGHBOUR, -1.0)


async def test_too_many_at_once_are_misses(loaded: tuple[PairModel, PairHead]) -> None:
    judge = PairJudge(*loaded, cosine=True)
    found = await asyncio.gather(*(judge.judge(ASKED, candidates(OTHER), POLICY) for _ in range(MAX_WAITING + 3)))
    reasons = [item.reason for item in found if isinstance(item, Refused)]
    assert reasons.count(Miss.JUDGE_BUSY) == 3
    assert reasons.count(Miss.JUDGE_REFUSED) == MAX_WAITING
    await judge.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (GRAPH, HEAD):
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path


def test_the_weights_are_small_enough_to_ship() -> None:
    assert (FOLDER / GRAPH).stat().st_size <= 24_000_000


@pytest.mark.parametrize("name", [GRAPH, HEAD])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(JudgeError, match=f"{name} cannot be read"):
        load(folder)


def test_a_damaged_graph_is_named(folder: Path) -> None:
    data = bytearray((folder / GRAPH).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / GRAPH).write_bytes(data)
    with pytest.raises(JudgeError, match=f"{GRAPH} is damaged"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"points": []}'])
def test_a_damaged_head_is_named(folder: Path, text: str) -> None:
    (folder / HEAD).write_text(text)
    with pytest.raises(JudgeError, match=f"{HEAD} is damaged"):
        load(folder)


def test_a_head_of_other_words_is_named(folder: Path) -> None:
    document = orjson.loads((folder / HEAD).read_bytes())
    (folder / HEAD).write_bytes(orjson.dumps(document | {"words_sha256": "0" * 64}))
    with pytest.raises(JudgeError, match="is not the file that"):
        load(folder)


def test_words_are_read_where_they_lie(tmp_path: Path) -> None:
    table = word_table(find_model() / "model.safetensors")
    assert table.shape[1] == 384
    short = tmp_path / "short.safetensors"
    short.write_bytes(b"\xff" * 6)
    with pytest.raises(ValueError, match="longer than the file"):
        word_table(short)


async def test_missing_weights_stop_the_start_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(JudgeError, match=HEAD):
        await open_judge(validate({}, source="test"), tmp_path)
    allowed = validate({"cache": {"judge": {"on_missing": "threshold"}}}, source="test")
    assert isinstance(await open_judge(allowed, tmp_path), ThresholdJudge)
    assert "similarity alone decides" in caplog.text


async def test_the_settings_choose_the_judge() -> None:
    default = await open_judge(validate({}, source="test"))
    assert isinstance(default, PairJudge)
    assert default.floor(POLICY) == PAIR_THRESHOLD
    await default.close()
    for cache in ({"judge": {"kind": "threshold"}}, {"embedder": {"kind": "none"}}, {"default": {"mode": "exact"}}):
        assert isinstance(await open_judge(validate({"cache": cache}, source="test")), ThresholdJudge)
