"""What the benchmarks of chunk reuse count and break; the engines themselves are tested elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.checkpoint import BUNDLED, load_checkpoint
from engine.reuse.point import load
from loadtest.engine.agent import PrefixCache, Runs, shares
from loadtest.engine.chunks import QUICK, Pair, Subject, rows
from loadtest.engine.reusing import Heard, Manner, Texts, asked
from loadtest.engine.tiers import INJURIES, Place, Tally, Verdict


def heard(first: float, cached: int = 0, tier: str = "none") -> Heard:
    return Heard(first, "", 1000, cached, 0, 2 if cached else 0, 0, tier)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(BUNDLED, load_checkpoint(BUNDLED, name="bundled"), Manner(), QUICK, 1)


def test_a_prefix_is_known_by_whole_blocks_and_never_all_of_it() -> None:
    cache = PrefixCache(0)
    assert [cache.serve(list(range(40))) for _ in range(2)] == [0, 32]
    assert cache.serve([*range(32), 7]) == 32
    assert cache.serve(list(range(32))) == 31
    assert cache.serve([9, *range(31)]) == 0


def test_a_small_prefix_cache_forgets_the_ends_of_the_oldest_first() -> None:
    cache = PrefixCache(48)
    cache.serve(list(range(32)))
    cache.serve(list(range(100, 132)))
    assert cache.serve(list(range(33))) == 16


def test_runs_are_found_at_any_offset_and_forgotten() -> None:
    runs = Runs(100)
    text = list(range(80))
    assert runs.serve([*text, 500], 0) == 0
    assert runs.serve([600] * 5 + text[7:] + [601], 0) == 73
    assert runs.serve(list(range(1000, 1090)), 0) == 0
    assert runs.serve([*text, 500], 0) == 0


def test_shares_add_up() -> None:
    text = list(range(64))
    found = shares([[*text, 900], [*text, 901], [902, *text, 903]], 0, 0.25)
    assert found.tokens == 65 + 65 + 66
    assert found.prefix == 64 / 196
    assert found.found == 64 / 196
    assert found.saved == 112 / 196


def test_texts_have_as_many_tokens_as_asked_for(subject: Subject) -> None:
    texts = Texts(subject.checkpoint.tokenizer, subject.checkpoint.config.vocab_size, seed=3)
    written = [texts.text(50) for _ in range(5)]
    assert len(set(written)) == 5
    assert all(45 <= len(subject.checkpoint.tokenizer.encode_text(text)) <= 50 for text in written)


def test_a_manner_is_a_point_the_engine_can_read(subject: Subject, tmp_path: Path) -> None:
    Manner("epic", 0.2).point(subject.checkpoint).save(tmp_path / "point.json")
    point = load(tmp_path / "point.json")
    assert (point.selector, point.ratio) == ("epic", 0.2)
    point.check_model(subject.checkpoint.fingerprint, subject.checkpoint.dtype, "here")


def test_prompts_are_new_orders_behind_new_heads(subject: Subject) -> None:
    one, two = (subject.prompt(subject.groups[0]) for _ in range(2))
    assert one["messages"][0] != two["messages"][0]  # type: ignore[index]
    assert len(asked("h", ["a", "b"], "q")["messages"][1]["content"]) == 3


def test_what_is_saved_is_held_against_operations(subject: Subject) -> None:
    assert subject.operations(heard(1.0)) == pytest.approx(1.0, abs=1e-3)
    assert subject.operations(heard(1.0, cached=500)) == pytest.approx(0.5, abs=0.01)
    pairs = [Pair(heard(0.6, 500, "pool"), heard(1.0))]
    table = rows(subject, dict.fromkeys(("new", "pool", "memory", "disk"), pairs))
    by_name = {row.name: row for row in table}
    assert by_name["… saved, of what operations allow"].measured == pytest.approx(0.4 / 0.5, abs=0.02)
    assert by_name["first token, 2 × 96 tokens and a question, from disk"].holds is False


@pytest.mark.parametrize("name", [name for name in INJURIES if "redis" not in name])
def test_injuries_are_real_and_over_in_the_end(name: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "kv", small=False, redis=None)
    place.disk.mkdir()
    for number in range(16):
        (place.disk / f"{number}.data").write_bytes(bytes(100))
    with INJURIES[name](place):
        whole = [path for path in place.files() if path.read_bytes() == bytes(100)]
        left = {"read errors": 0, "damaged files": 0, "slow reads": 12, "reads that hang": 14, "deleted directory": 0}
        assert len(whole) == left.get(name, 16)
        if name == "slow reads":
            assert all(path.read_bytes() == bytes(100) for path in place.disk.rglob("*") if path.is_fifo())
    assert not any(path.is_fifo() for path in place.disk.rglob("*"))


def test_a_verdict_says_what_does_not_hold() -> None:
    counted = dict.fromkeys(
        (
            "hitpath_engine_check_failures_total",
            "hitpath_engine_reuse_book_failures_total",
            "hitpath_engine_blocksused",
            "hitpath_engine_kv_writing_bytes",
        ),
        0.0,
    )
    good = Verdict("full", {"filling": Tally(answered=3, equal=3)}, (1.0, 1.0), (9.0, 0.1), counted, same=True)
    assert good.failures == []
    bad = {"filling": Tally(answered=3, equal=2, failed=1, problems=["no"])}
    leaking = counted | {"hitpath_engine_blocksused": 2.0}
    assert Verdict("full", bad, (1.0, 9.0), (0.1, 8.0), leaking, same=True).failures == [
        "no",
        "1 requests were not answered",
        "1 answers are others",
        "memory grows by 8.0 MiB a minute late",
        "hitpath_engine_blocksused is 2",
    ]
