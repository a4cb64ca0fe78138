"""Trust without a gateway around it: rulings, complaints, state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.judge.load import load
from gateway.judge.pairjudge import PairJudge
from gateway.settings import Settings
from gateway.trust import Ruling, Trust, TrustRules
from gateway.trusting import make_trust
from gateway.truststate import NAME, TrustFile, read
from policies.category import PAIR_THRESHOLD, CategoryPolicy, CategoryTable
from policies.judge import Accepted, Candidate, Refused, Stage, ThresholdJudge, Verdict
from policies.reasons import Miss

POLICY = CategoryPolicy("general", error_budget=0.05)
POLICIES = {"general": POLICY, "never": CategoryPolicy("never", error_budget=0.0)}


def trust(judge: str = "j", draw: float = 0.0, **rules: Any) -> Trust:
    return Trust(TrustRules(**rules), POLICIES, lambda policy: 0.9, judge=judge, draw=lambda: draw)


def verdict(id: int, p: float, *, similarity: float = 0.9) -> Verdict:
    return Verdict(Candidate(id, f"question {id}", similarity), Stage.PAIR, p >= 0.9, p)


def rule(known: Trust, *verdicts: Verdict, policy: CategoryPolicy = POLICY, asked: str = "asked") -> Ruling | None:
    best = max(verdicts, key=lambda item: item.probability or 0.0)
    judged = Accepted(best.candidate, 1.0, verdicts) if best.accepted else Refused(Miss.JUDGE_REFUSED, 0.0, verdicts)
    pairs = known.unrefuted(b"s", asked, [item.candidate for item in verdicts])
    return known.rule(policy, judged, pairs, 0.9)


def test_the_best_candidate_is_served_from_the_point_on() -> None:
    known = trust()
    ruling = rule(known, verdict(1, 0.91), verdict(2, 0.96))
    assert ruling is not None
    assert (ruling.entry, ruling.serve, ruling.claimed) == (2, True, 0.96)
    below = rule(known, verdict(1, 0.8))
    assert below is not None
    assert not below.serve
    assert known.reason(below, Refused(Miss.JUDGE_REFUSED, 0.8)) is Miss.JUDGE_REFUSED


def test_a_similarity_is_not_guarded() -> None:
    table = CategoryTable(CategoryPolicy("default"), {})
    assert make_trust(Settings(), ThresholdJudge(), table).rules.budget(0.01).guard == 0
    assert TrustRules(start="earned").budget(0.01).guard > 0


async def test_at_the_default_settings_a_paraphrase_is_served_as_the_second_question_ever() -> None:
    table = CategoryTable(CategoryPolicy("default", threshold=PAIR_THRESHOLD), {"assistant": {}}, judged=True)
    judge, policy = PairJudge(*load(), cosine=True), table.policies["assistant"]
    known = make_trust(Settings(), judge, table)
    # The two questions in the README.
    stored, asked = Candidate(1, "How do I find the harbour?", 0.9941), "How can I find the harbour?"
    judgement = await judge.judge(asked, [stored], policy)
    ruling = known.rule(policy, judgement, known.unrefuted(b"s", asked, [stored]), judge.point(policy))
    await judge.close()
    assert ruling is not None
    assert ruling.serve
    # One hit in ten is checked while nothing is saved up.
    decision = known.settle(ruling, checks=True)
    assert decision is not None
    assert decision.share == 0.1


def test_a_budget_of_nothing_serves_nothing_by_meaning() -> None:
    known = trust()
    ruling = rule(known, verdict(1, 0.999), policy=POLICIES["never"])
    assert ruling is not None
    assert not ruling.serve
    assert known.reason(ruling, Accepted(Candidate(1, "", 1.0), 1.0)) is Miss.BUDGET_LEARNING


def test_an_entry_that_was_wrong_is_no_candidate_for_the_next_either() -> None:
    known = trust()
    ruling = rule(known, verdict(1, 0.92))
    assert ruling is not None
    decision = known.settle(ruling, checks=True)
    assert decision is not None
    assert decision.check
    known.learn(ruling, decision, 1.0)
    assert known.unrefuted(b"s", "asked", [Candidate(1, "question 1", 0.9)]) == {}
    again = rule(known, verdict(1, 0.92), asked="asked otherwise")
    assert again is not None
    assert again.p < again.claimed
    assert not again.serve


@pytest.mark.parametrize("wrong", [{"version": 2}, {"refuted": ["x"]}, {"budgets": 5}, {"economics": {"general": {}}}])
def test_a_state_that_is_none_changes_nothing(wrong: dict[str, Any]) -> None:
    known = trust()
    before = known.plain()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        known.restore({**trust().plain(), **wrong})
    assert known.plain() == before


def test_labels_of_another_judge_are_dropped_and_refuted_pairs_are_not() -> None:
    first = trust("one")
    ruling = rule(first, verdict(1, 0.92))
    assert ruling is not None
    decision = first.settle(ruling, checks=True)
    assert decision is not None
    first.learn(ruling, decision, 1.0)
    second = trust("two")
    second.restore(orjson.loads(orjson.dumps(first.plain())))
    assert second.refuted == 1
    figures = second.figures("general")
    assert figures is not None
    assert figures["checked"] == 0


def test_a_hit_is_complained_about_once() -> None:
    known = trust()
    ruling = rule(known, verdict(1, 0.92))
    assert ruling is not None
    known.served(b"key", "acme/a", ruling, now=100.0)
    assert known.corrected(1, "other") == 0
    assert known.refreshed(b"key", now=99.0) is None
    assert known.corrected(1, "acme") == 1
    assert known.corrected(1, "acme") == 0
    assert known.refreshed(b"key", now=100.0) is None


async def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    known = trust()
    file = await TrustFile.open(tmp_path, known)
    known.changed += 1
    await asyncio.gather(*(file.flush() for _ in range(5)))
    path = tmp_path / NAME
    assert read(path) == orjson.loads(orjson.dumps(known.plain()))
    await file.close()
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[: len(raw) // 2], b"", b"{}", raw.replace(b"general", b"genera1", 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum"):
            read(path)


async def test_a_directory_that_cannot_be_written_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = trust()
    directory = tmp_path / "gone"
    file = await TrustFile.open(directory, known)
    for _ in range(3):
        known.changed += 1
        await file.flush()
    await file.close()
    assert caplog.text.count("cannot be written") == 1
