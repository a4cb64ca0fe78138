"""Error budgets, checks, corrections, load and explanations over real sockets.

The embedder adds up a vector per word, so that the share of common words is the similarity; similarity alone decides.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from gateway.settings import Settings, SettingsError, validate
from gateway.truststate import NAME
from loadtest.evaluate import read_pairs
from tests.fakes import Hang, Reply, ScriptedUpstream, error_reply, json_reply
from tests.gateway.harness import ADMIN_KEY, Answer, Client, chat_body, serving
from tests.gateway.test_process import config_file, served, start

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "sleeping",
    "old",
    "dog",
    "near",
    "some",
    "river",
]
ASKED = " ".join(WORDS)
ONE_OFF = " ".join([*WORDS[:-1], "lake"])
"""Thirteen of fourteen words: a cosine of about .93."""
FAR = "how long must an egg be boiled until it is hard"
CHECK_ALL: dict[str, Any] = {"checked_min": 1.0, "checked_max": 1.0}


def say(text: str) -> Reply:
    """A chat answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    return json_reply(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    )


RIGHT = say("Rivers flow down to the sea because of gravity.")
WRONG = say("Bread needs flour, water, salt, yeast and patience.")


def trusting_settings(data_dir: Path, upstream: ScriptedUpstream, embedder: ScriptedUpstream, **cache: Any) -> Settings:
    upstreams = cache.pop("upstreams", {})
    settings = {
        "embedder": {"kind": "openai", "url": embedder.url, "model": "words"},
        "judge": {"kind": "threshold"},
        "default": {"threshold": 0.8, "error_budget": 0.05},
        "categories": {"general": {}, "math": {"mode": "semantic"}},
        "budgets": CHECK_ALL,
        **cache,
    }
    named = [{"name": "up0", "kind": "openai", "url": upstream.url, **upstreams}]
    return validate({"data_dir": data_dir, "upstreams": named, "cache": settings}, source="test")


@pytest.fixture
async def embedder() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as embedder:
        yield embedder


@pytest.fixture
def admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITPATH_ADMIN_KEY", ADMIN_KEY)


def is_semantic(answer: Answer) -> bool:
    return answer.cache.startswith("hitpath; hit; ") and answer.cache.endswith("; detail=semantic")


async def stats(client: Client, category: str = "general") -> dict[str, Any]:
    answer = await client.ask("GET", "/admin/stats", headers={"authorization": f"Bearer {ADMIN_KEY}"})
    found: dict[str, Any] = answer.json()["categories"][category]
    return found


async def metric(client: Client, name: str) -> float:
    text = (await client.ask("GET", "/metrics")).body.decode()
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))


async def until(client: Client, name: str, value: float) -> None:
    """Wait for a counter: checks run in the background."""
    async with asyncio.timeout(20):
        while await metric(client, name) < value:
            await asyncio.sleep(0.01)


async def paraphrases(client: Client, count: int, first: int = 0) -> list[Answer]:
    """Ask questions one word off from one that is stored, each another one."""
    return [await client.chat(" ".join([*WORDS[:-1], f"pond{number}"])) for number in range(first, first + count)]


# --- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("admin_key")
async def test_hits_are_checked_behind_the_clients_back(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        await client.chat(ASKED)
        hit = await client.chat(ONE_OFF, stream=True)
        assert is_semantic(hit)
        await until(client, 'hitpath_checks_total{outcome="right"}', 1)
        # The check asks in the client's words, and for no stream.
        checked = upstream.exchanges[1].json()
        assert checked["messages"][0]["content"] == ONE_OFF
        assert "stream" not in checked
        figures = (await stats(client))["budget"]
        assert (figures["hits"], figures["checked"], figures["wrong"]) == (1, 1, 0)
        assert figures["standing"] == "believed"


async def test_a_check_that_hangs_delays_nobody_and_ends_with_the_gateway(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.script(RIGHT)
    upstream.default = Hang()
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        await client.chat(ASKED)
        assert all(is_semantic(answer) for answer in await paraphrases(client, 5))
        # Two checks at a time reach the backend, whatever waits.
        await upstream.arrival(3)
        assert len(upstream.exchanges) == 3
    for exchange in upstream.exchanges[1:]:
        await exchange.disconnected.wait()


def topic(number: int, last: str) -> str:
    """A question about something of its own; those that differ in the last word alone are near."""
    return " ".join([*(f"word{number}x{place}" for place in range(40)), last])


async def wrong_hits(client: Client, upstream: ScriptedUpstream, most: int) -> int:
    """Ask near questions whose answer is another one, each about another entry, until one is not served."""
    before = await metric(client, 'hitpath_checks_total{outcome="wrong"}')
    for number in range(most):
        upstream.default = RIGHT
        await client.chat(topic(number, "one"))
        upstream.default = WRONG
        if not is_semantic(await client.chat(topic(number, "two"))):
            return number
        await until(client, 'hitpath_checks_total{outcome="wrong"}', before + number + 1)
    raise AssertionError("wrong answers are served for ever")


@pytest.mark.usefixtures("admin_key")
async def test_the_first_wrong_answers_tighten_a_believed_judge(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        assert await wrong_hits(client, upstream, 20) <= 3
        figures = (await stats(client))["budget"]
        assert figures["standing"] == "tightened"
        assert figures["point"] > 0.97
        assert "detail=below-point" in (await client.chat(topic(0, "three"))).cache
        assert await metric(client, 'hitpath_budget_standing{category="general",state="tightened"}') == 1


@pytest.mark.usefixtures("admin_key")
async def test_an_exhausted_budget_leaves_exact_repeats_and_recovers_by_itself(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    settings = trusting_settings(
        tmp_path,
        upstream,
        embedder,
        default={"threshold": 0.8, "error_budget": 0.2},
        budgets={**CHECK_ALL, "start": "earned"},
    )
    async with serving(settings) as client:

        async def until_open(first: int) -> None:
            """What is not served is compared for nothing, and by that the category finds its way."""
            upstream.default = RIGHT
            for number in range(first, first + 200):
                await client.chat(topic(number, "one"))
                await client.chat(topic(number, "two"))
                if (await stats(client))["budget"]["standing"] == "open":
                    return
            raise AssertionError("the category does not open")

        await until_open(1000)
        assert await wrong_hits(client, upstream, 20) <= 8
        figures = (await stats(client))["budget"]
        assert (figures["standing"], figures["point"], figures["exhaustions"]) == ("exhausted", None, 1)
        assert "detail=budget-exhausted" in (await client.chat(topic(0, "three"))).cache
        assert "detail=exact" in (await client.chat(topic(0, "one"))).cache
        await until_open(2000)
        upstream.default = RIGHT
        await client.chat(topic(3000, "one"))
        assert is_semantic(await client.chat(topic(3000, "two")))


@pytest.mark.usefixtures("admin_key")
async def test_a_start_that_must_be_earned_serves_nothing_before(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    settings = trusting_settings(tmp_path, upstream, embedder, budgets={**CHECK_ALL, "start": "earned"})
    async with serving(settings) as client:
        await client.chat(ASKED)
        answer = await client.chat(ONE_OFF)
        assert "detail=budget-learning" in answer.cache
        await until(client, 'hitpath_checks_total{outcome="right"}', 1)
        assert (await stats(client))["budget"]["standing"] == "learning"
        assert len(upstream.exchanges) == 2


async def test_without_budgets_the_judge_is_believed(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    settings = trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False})
    async with serving(settings) as client:
        await client.chat(ASKED)
        assert all(is_semantic(answer) for answer in await paraphrases(client, 20))
        assert len(upstream.exchanges) == 1


async def test_a_model_compares_where_words_do_not_tell(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    # About two thirds of the words are common: neither clearly the same nor clearly not.
    upstream.script(say("one two three four five six"), say("one two three four seven eight"), say("No."))
    settings = trusting_settings(tmp_path, upstream, embedder, budgets={**CHECK_ALL, "judge_model": "m"})
    async with serving(settings) as client:
        await client.chat(ASKED)
        assert is_semantic(await client.chat(ONE_OFF))
        await until(client, 'hitpath_checks_total{outcome="wrong"}', 1)
        asked = upstream.exchanges[2].json()["messages"][1]["content"]
        assert ONE_OFF in asked
        assert "four five six" in asked


async def test_a_model_that_nobody_serves_stops_the_start(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    settings = trusting_settings(
        tmp_path, upstream, embedder, budgets={"judge_model": "x"}, upstreams={"models": ["m"]}
    )
    with pytest.raises(SettingsError, match=r"cache\.budgets\.judge_model"):
        async with serving(settings):
            pass


async def test_a_backend_that_refuses_gives_no_label(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.script(RIGHT)
    upstream.default = error_reply(500)
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        await client.chat(ASKED)
        assert is_semantic(await client.chat(ONE_OFF))
        await until(client, 'hitpath_checks_total{outcome="failed"}', 1)


# --- corrections ---------------------------------------------------------------------------------------------------


async def feedback(client: Client, entry: object, verdict: object = "wrong", **headers: str) -> Answer:
    return await client.post("/v1/hitpath/feedback", {"entry": entry, "verdict": verdict}, **headers)


async def test_a_correction_removes_the_entry_and_separates_the_pair(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False})) as client:
        await client.chat(ASKED)
        hit = await client.chat(ONE_OFF)
        entry = int(hit.headers["x-hitpath-entry"])
        assert (await feedback(client, entry)).json() == {
            "entry": entry,
            "verdict": "wrong",
            "removed": True,
            "hits": 1,
        }
        assert "fwd=miss" in (await client.chat(ONE_OFF)).cache
        # The first question has no answer any more, and the other's is not given for it.
        again = await client.chat(ASKED)
        assert "detail=refuted" in again.cache
        assert (await feedback(client, entry)).status == 404
        assert await metric(client, 'hitpath_complaints_total{kind="feedback"}') == 1


async def test_praise_is_heard_and_changes_nothing(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False})) as client:
        entry = (await client.chat(ASKED)).headers["x-hitpath-entry"]
        assert (await feedback(client, entry, "right")).json()["removed"] is False
        assert is_semantic(await client.chat(ONE_OFF))


async def test_another_tenants_entry_is_not_there(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False})) as client:
        own = (await client.chat(ASKED, authorization="Bearer alice")).headers["x-hitpath-entry"]
        inner = (await client.chat(ASKED, authorization="Bearer alice", x_hitpath_namespace="a")).headers[
            "x-hitpath-entry"
        ]
        refused = await feedback(client, own, authorization="Bearer bob")
        assert (refused.status, refused.json()["error"]["code"]) == (404, "entry_not_found")
        assert (await feedback(client, own, authorization="Bearer alice", x_hitpath_namespace="a")).status == 404
        assert (await feedback(client, inner, authorization="Bearer alice")).json()["removed"] is True
        assert (await feedback(client, own, authorization="Bearer alice")).json()["removed"] is True


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "entry"),
        (b'{"entry": 0, "verdict": "wrong"}', "entry"),
        (b'{"entry": true, "verdict": "wrong"}', "entry"),
        (b'{"entry": "x", "verdict": "wrong"}', "entry"),
        (b'{"entry": 1e99, "verdict": "wrong"}', "entry"),
        (b'{"entry": 1, "verdict": "bad"}', "verdict"),
        (b'{"entry": 1}', "verdict"),
        (b'{"entry": 1, "verdict": "wrong", "why": ""}', "why"),
    ],
)
async def test_a_correction_that_cannot_be_read_is_named(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path, body: bytes, param: str | None
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        answer = await client.post("/v1/hitpath/feedback", body)
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)
        assert (await client.ask("GET", "/v1/hitpath/feedback")).status == 405


async def test_asking_anew_at_once_is_a_complaint(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False})) as client:
        await client.chat(ASKED)
        # Nobody complains by refreshing what came from the backend, or an exact repeat.
        await client.chat(ASKED, cache_control="no-cache")
        assert is_semantic(await client.chat(ONE_OFF))
        await client.chat(ONE_OFF, cache_control="no-cache")
        assert await metric(client, 'hitpath_complaints_total{kind="refresh"}') == 1
        assert "detail=refuted" in (await client.chat(ASKED)).cache


async def test_a_refresh_much_later_is_no_complaint(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    settings = trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False, "refresh_within": "0s"})
    async with serving(settings) as client:
        await client.chat(ASKED)
        assert is_semantic(await client.chat(ONE_OFF))
        await client.chat(ONE_OFF, cache_control="no-cache")
        assert await metric(client, 'hitpath_complaints_total{kind="refresh"}') == 0
        assert "detail=exact" in (await client.chat(ASKED)).cache


# --- restarts ------------------------------------------------------------------------------------------------------


async def test_a_correction_survives_kill_9(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    cache = {
        "embedder": {"kind": "openai", "url": embedder.url, "model": "words"},
        "judge": {"kind": "threshold"},
        "default": {"threshold": 0.8},
        "budgets": {"start": "judge", "checked_min": 0.01, "checked_max": 0.01},
    }
    config = config_file(tmp_path, upstream, cache=cache)

    async def ask(session: aiohttp.ClientSession, url: str, text: str) -> tuple[str, str]:
        async with session.post(f"{url}/v1/chat/completions", json=chat_body(text)) as response:
            await response.read()
            return response.headers["cache-status"], response.headers.get("x-hitpath-entry", "")

    async with served(config) as (process, url), aiohttp.ClientSession() as session:
        await ask(session, url, ASKED)
        cache_status, entry = await ask(session, url, ONE_OFF)
        assert "detail=semantic" in cache_status
        async with session.post(f"{url}/v1/hitpath/feedback", json={"entry": int(entry), "verdict": "wrong"}) as said:
            assert (await said.json())["removed"] is True
        process.kill()
        await process.wait()
    async with served(config) as (_, url), aiohttp.ClientSession() as session:
        assert "fwd=miss" in (await ask(session, url, ONE_OFF))[0]
        assert "detail=refuted" in (await ask(session, url, ASKED))[0]


@pytest.mark.usefixtures("admin_key")
async def test_what_was_learnt_survives_a_restart(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    settings = trusting_settings(tmp_path, upstream, embedder)
    async with serving(settings) as client:
        await client.chat(ASKED)
        await paraphrases(client, 5)
        await until(client, 'hitpath_checks_total{outcome="right"}', 5)
        before = await stats(client)
    async with serving(settings) as client:
        assert (await stats(client))["budget"] == before["budget"]
    process = await start("cache", "stats", "--data-dir", str(tmp_path), "--json")
    stdout, _ = await process.communicate()
    shown = orjson.loads(stdout)["categories"]["general"]["budget"]
    assert all(shown[name] == before["budget"][name] for name in ("standing", "hits", "checked", "wrong", "savings"))
    # Under another budget the old labels prove nothing.
    stricter = trusting_settings(tmp_path, upstream, embedder, default={"threshold": 0.8, "error_budget": 0.01})
    async with serving(stricter) as client:
        await client.chat(FAR)
        assert (await stats(client))["budget"]["checked"] == 0


async def test_a_damaged_state_is_reported_and_begun_anew(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = trusting_settings(tmp_path, upstream, embedder)
    async with serving(settings) as client:
        await client.chat(ASKED)
        await paraphrases(client, 1)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes().replace(b"standing", b"sitting!"))
    async with serving(settings) as client:
        assert is_semantic((await paraphrases(client, 1, 1))[0])
    assert str(path) in caplog.text
    assert "checksum" in caplog.text
    assert path.with_name(f"{NAME}.damaged").exists()


# --- economics -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("admin_key")
async def test_a_stage_that_does_not_pay_is_skipped_and_probed_again(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    economics = {"evidence": 20, "pause": 10, "longest_pause": 10}
    settings = trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False}, economics=economics)
    async with serving(settings) as client:
        # Nothing repeats: not one hit, while each look-up costs an embedding.
        for number in range(20):
            await client.chat(f"{number} " * 8)
        figures = (await stats(client))["economics"]
        assert figures["stage"] == "skipped"
        assert figures["hit_rate"] == 0
        assert figures["break_even"] > 0
        embedded = len(embedder.exchanges)
        skipped = await client.chat("another question", x_hitpath_category="general")
        assert "detail=not-worth-it" in skipped.cache
        assert len(embedder.exchanges) == embedded
        assert await metric(client, 'hitpath_semantic_stage{category="general",state="skipped"}') == 1
        # Exact repeats are found as before.
        assert "detail=exact" in (await client.chat("another question")).cache
        for number in range(9):
            await client.chat(f"question {number} of the pause", x_hitpath_category="general")
        assert (await stats(client))["economics"]["stage"] == "probing"
        await client.chat("a question of the probe", x_hitpath_category="general")
        assert len(embedder.exchanges) == embedded + 1


@pytest.mark.usefixtures("admin_key")
async def test_a_price_that_was_saved_is_counted(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    price = {"input": 2.0, "output": 10.0}
    settings = trusting_settings(tmp_path, upstream, embedder, budgets={"keep": False}, upstreams={"price": price})
    async with serving(settings) as client:
        await client.chat(ASKED)
        assert is_semantic(await client.chat(ONE_OFF))
        assert (await stats(client))["economics"]["saved_price"] == pytest.approx(0.003)


# --- load ----------------------------------------------------------------------------------------------------------


async def test_load_relaxes_acceptance_to_its_bound_and_stops_checks(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    things = [f"thing{number}" for number in range(14)]
    stored, two_off = " ".join(things), " ".join([*things[:-2], "other", "words"])
    settings = trusting_settings(
        tmp_path,
        upstream,
        embedder,
        default={"threshold": 0.9, "max_relax": 0.1, "error_budget": 0.05},
        categories={"general": {}, "risky": {"max_relax": 0}},
        load={"rise": "1ms", "fall": "1ms"},
        upstreams={"slots": 1},
    )
    async with serving(settings) as client:
        await client.chat(ASKED, x_hitpath_category="general")
        await client.chat(stored, x_hitpath_category="general")
        await client.chat(stored, x_hitpath_category="risky", x_hitpath_namespace="r")
        # The budget lets nothing through below the judge's own point that labels have not earned.
        for number in range(0, 150, 10):
            await paraphrases(client, 10, number)
            await until(client, 'hitpath_checks_total{outcome="right"}', number + 10)
        before = len(upstream.exchanges)
        explained = (await client.chat(two_off, x_hitpath_mode="explain", x_hitpath_category="general")).json()
        assert explained["outcome"] == {"would": "ask-backend", "reason": "below-threshold", "entry": None}
        # Two slow calls on one slot: the pool is full.
        gate = asyncio.Event()
        upstream.script(*[Reply(RIGHT.parts, headers=RIGHT.headers, gate=gate) for _ in range(2)])
        slow = [asyncio.create_task(client.chat(f"{FAR} {number}")) for number in range(2)]
        await upstream.arrival(before + 2)
        for _ in range(2000):
            explained = (await client.chat(two_off, x_hitpath_mode="explain", x_hitpath_category="general")).json()
            if explained["load"]["relief"] > 0.99:
                break
            await asyncio.sleep(0.005)
        assert explained["point"]["wanted"] == pytest.approx(0.8, abs=0.01)
        assert is_semantic(await client.chat(two_off, x_hitpath_category="general"))
        assert await metric(client, 'hitpath_load{upstream="up0"}') > 0.99
        # The hit was not checked: nobody adds to the load.
        assert len(upstream.exchanges) == before + 2
        risky = await client.chat(
            two_off, x_hitpath_category="risky", x_hitpath_namespace="r", cache_control="only-if-cached"
        )
        assert risky.status == 504
        gate.set()
        await asyncio.gather(*slow)
        for _ in range(2000):
            explained = (await client.chat(FAR, x_hitpath_mode="explain")).json()
            if explained["load"]["relief"] == 0:
                break
            await asyncio.sleep(0.005)


async def test_refusals_are_load(upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path) -> None:
    settings = trusting_settings(tmp_path, upstream, embedder, load={"rise": "1ms", "fall": "1ms"})
    upstream.default = error_reply(429, retry_after="1")
    async with serving(settings) as client:
        for number in range(5):
            assert (await client.chat(f"question {number}")).status == 429
            await asyncio.sleep(0.01)
        explained = (await client.chat("question", x_hitpath_mode="explain")).json()
        assert explained["load"]["level"] > 0.5


# --- explanations --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("admin_key")
async def test_a_call_is_explained_and_nothing_is_done(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        entry = int((await client.chat(ASKED)).headers["x-hitpath-entry"])
        before = client.gateway.store.stats().hits
        exact = await client.chat(ASKED, x_hitpath_mode="explain")
        assert exact.json()["outcome"] == {"would": "exact-hit", "reason": None, "entry": entry}
        assert exact.cache == "hitpath; detail=explain"
        near = (await client.chat(ONE_OFF, stream=True, x_hitpath_mode="Explain")).json()
        assert near["outcome"] == {"would": "semantic-hit", "reason": None, "entry": entry}
        assert near["category"]["name"] == "general"
        assert near["category"]["why"] == "fallback"
        assert re.fullmatch(r"[0-9a-f]{32}", near["scope"]["hash"])
        assert near["scope"]["made_of"]["namespace"] == "anonymous"
        assert near["scope"]["made_of"]["fields"]["model"] == "m"
        (neighbour,) = near["neighbours"]
        assert neighbour["entry"] == entry
        assert neighbour["text"] == ASKED
        assert neighbour["stage"] == "similarity"
        assert neighbour["accepted"] is True
        assert near["point"]["in_force"] == pytest.approx(0.8)
        assert near["budget"]["standing"] == "believed"
        far = (await client.chat(FAR, x_hitpath_mode="explain", x_hitpath_category="math")).json()
        assert far["category"] == {"name": "math", "why": "header", "probability": None}
        assert far["outcome"] == {"would": "ask-backend", "reason": "below-threshold", "entry": None}
        assert far["neighbours"][0]["stage"] == "not-judged"
        assert (await client.chat(FAR, x_hitpath_mode="explain", cache_control="no-store")).json()["outcome"] == {
            "would": "bypass", "reason": "no-store", "entry": None
        }  # fmt: skip
        assert len(upstream.exchanges) == 1
        assert client.gateway.store.stats().hits == before
        figures = await stats(client)
        assert figures["budget"]["candidates"] == 0
        assert figures["economics"]["lookups"] == 1


@pytest.mark.usefixtures("admin_key")
async def test_the_commands_explain_and_show_what_was_learnt(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    async with serving(trusting_settings(tmp_path, upstream, embedder)) as client:
        await client.chat(ASKED)
        process = await start("cache", "explain", ONE_OFF, "--model", "m", "--url", client.url)
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, stderr
        assert "would: semantic-hit" in stdout.decode()
        assert ASKED in stdout.decode()
        process = await start("cache", "explain", ONE_OFF, "--model", "m", "--url", client.url, "--json")
        stdout, _ = await process.communicate()
        assert orjson.loads(stdout)["outcome"]["would"] == "semantic-hit"
        process = await start("cache", "stats", "--url", client.url, "--admin-key", ADMIN_KEY)
        stdout, _ = await process.communicate()
        assert re.search(r"^general +0\.05 +believed +0\.\d+ +0 ", stdout.decode(), re.MULTILINE)
    process = await start("cache", "explain", ONE_OFF, "--model", "m", "--url", "http://127.0.0.1:1")
    assert await process.wait() == 1


# --- near misses ---------------------------------------------------------------------------------------------------


async def test_near_misses_are_lines_that_eval_reads(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.default = RIGHT
    settings = trusting_settings(
        tmp_path, upstream, embedder, budgets={**CHECK_ALL, "start": "earned"}, near_misses={"keep": "text"}
    )
    async with serving(settings) as client:
        await client.chat(ASKED)
        await client.chat(ONE_OFF)
        await until(client, 'hitpath_checks_total{outcome="right"}', 1)
    path = tmp_path / "near-misses.jsonl"
    (row,) = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    assert (row["a"], row["b"], row["label"], row["wrong"]) == (ASKED, ONE_OFF, -1, 0.0)
    assert row["reason"] == "budget-learning"
    path.write_bytes(orjson.dumps({**row, "label": 1}) + b"\n")
    assert [(pair.a, pair.label) for pair in read_pairs(path)] == [(ASKED, 1)]


async def test_near_misses_keep_no_text_unless_allowed_and_stay_small(
    upstream: ScriptedUpstream, embedder: ScriptedUpstream, tmp_path: Path
) -> None:
    settings = trusting_settings(
        tmp_path,
        upstream,
        embedder,
        budgets={**CHECK_ALL, "start": "earned"},
        near_misses={"keep": "figures", "size": 1000},
    )
    for round_ in range(3):
        async with serving(settings) as client:
            await client.chat(ASKED)
            await paraphrases(client, 3, 10 * round_)
    written = {
        path.name: path.read_bytes() for path in (tmp_path / "near-misses.jsonl", tmp_path / "near-misses.jsonl.1")
    }
    assert all(written.values())
    assert all(b"quick" not in lines for lines in written.values())
