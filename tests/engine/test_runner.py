"""The worker thread: its bounds, its fairness, its ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint, load_checkpoint
from engine.errors import QueueFull, ShuttingDown
from engine.runner import Event, Failed, Finished, Job, Progress, Runner
from engine.sampling import SamplingParams
from tests.engine import checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.write(directory, max_position_embeddings=4096)
    return load_checkpoint(directory, name="tiny")


@pytest.fixture
def runner(checkpoint: Checkpoint) -> Iterator[Runner]:
    runner = Runner(checkpoint, kv_tokens=4096, max_running=2, max_waiting=2, threads=1)
    yield runner
    runner.close()


class Asked:
    """A job and what came of it; `allow` holds the worker back until the test lets it go on."""

    def __init__(self, **params: object) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.allow = threading.Event()
        self.allow.set()
        settings = {"ignore_eos": True, "temperature": 0.0, "max_tokens": 5, **params}
        self.job = Job([1, 2, 3], SamplingParams(**settings), self._emit)  # type: ignore[arg-type]

    def _emit(self, event: Event) -> None:
        self.allow.wait(20)
        self.events.put(event)

    def answer(self) -> tuple[list[int], Event]:
        tokens = []
        while isinstance(event := self.events.get(timeout=20), Progress):
            tokens.append(event.choice.token)
        return tokens, event


def test_answers_are_the_same_alone_and_beside_others(runner: Runner) -> None:
    runner.start()
    alone = Asked(seed=1, temperature=1.0, max_tokens=20)
    runner.submit([alone.job])
    expected, _ = alone.answer()
    together = [Asked(seed=seed, temperature=1.0, max_tokens=20) for seed in (2, 1, 3)]
    runner.submit([asked.job for asked in together])
    answers = [asked.answer()[0] for asked in together]
    assert answers[1] == expected
    assert answers[0] != answers[2]


def test_the_limit_ends_with_length_and_an_end_token_with_stop(runner: Runner) -> None:
    runner.start()
    limited, ended = Asked(), Asked(ignore_eos=False, logit_bias={257: 100.0})
    runner.submit([limited.job, ended.job])
    tokens, last = limited.answer()
    assert len(tokens) == 5
    assert isinstance(last, Finished)
    assert (last.reason, last.tokens) == ("length", 5)
    assert ended.answer() == ([], Finished("stop", "", 1))


def test_a_stop_string_across_tokens_ends_the_answer(runner: Runner) -> None:
    runner.start()
    free = Asked(logit_bias={65: 100.0, 66: 99.9}, frequency_penalty=0.2, max_tokens=6)
    runner.submit([free.job])
    text = runner_text(free)
    assert len(set(text)) == 2, "the biased answer alternates between two letters"
    stopped = Asked(logit_bias={65: 100.0, 66: 99.9}, frequency_penalty=0.2, max_tokens=6, stop=(text[1:4],))
    runner.submit([stopped.job])
    shown = runner_text(stopped)
    assert shown == text[: text.index(text[1:4])]


def runner_text(asked: Asked) -> str:
    text = ""
    while True:
        match asked.events.get(timeout=20):
            case Progress(piece, _):
                text += piece
            case Finished(_, piece, _):
                return text + piece
            case Failed(message):
                raise AssertionError(message)


def test_a_full_queue_refuses_all_or_nothing(runner: Runner) -> None:
    runner.submit([Asked().job])  # not started: everything waits
    with pytest.raises(QueueFull):
        runner.submit([Asked().job, Asked().job])
    assert runner.depth() == (0, 1)
    runner.submit([Asked().job])
    with pytest.raises(QueueFull):
        runner.submit([Asked().job])


def test_cancelling_ends_running_and_waiting_jobs(runner: Runner) -> None:
    runner.start()
    jobs = [Asked(max_tokens=4000) for _ in range(4)]
    runner.submit([asked.job for asked in jobs])
    jobs[0].events.get(timeout=20)
    runner.cancel([asked.job for asked in jobs])
    quick = Asked()
    runner.submit([quick.job])
    assert len(quick.answer()[0]) == 5
    assert runner.depth() == (0, 0)
    assert jobs[3].events.empty()


def test_memory_bounds_what_runs_at_once(checkpoint: Checkpoint) -> None:
    runner = Runner(checkpoint, kv_tokens=20, max_running=4, max_waiting=4, threads=1)
    try:
        runner.start()
        first, second = Asked(max_tokens=10), Asked(max_tokens=10)
        first.allow.clear()
        runner.submit([first.job, second.job])
        first.allow.set()
        assert len(first.answer()[0]) == len(second.answer()[0]) == 10
    finally:
        runner.close()


def test_one_failing_answer_leaves_the_others_alone(runner: Runner) -> None:
    runner.start()
    good, bad = Asked(), Asked()
    bad.job.prompt = [10**6]  # outside the vocabulary: what the server would never let through
    runner.submit([bad.job, good.job])
    assert isinstance(bad.answer()[1], Failed)
    assert len(good.answer()[0]) == 5


def test_closing_cancels_and_refuses(checkpoint: Checkpoint) -> None:
    runner = Runner(checkpoint, kv_tokens=4096, max_running=2, max_waiting=2, threads=1)
    runner.start()
    asked = Asked(max_tokens=4000)
    runner.submit([asked.job])
    asked.events.get(timeout=20)
    runner.close()
    assert not any(thread.name == "hitpath-engine" for thread in threading.enumerate())
    with pytest.raises(ShuttingDown):
        runner.submit([Asked().job])


def test_a_long_prompt_goes_in_chunks_and_gives_the_same_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    runner = Runner(checkpoint, kv_tokens=4096, max_running=1, max_waiting=2, threads=1)
    try:
        runner.start()
        long, again = Asked(max_tokens=8), Asked(max_tokens=1)
        prompt = [(i * 7) % 256 for i in range(1300)]
        long.job.prompt = prompt
        runner.submit([long.job])
        tokens, _ = long.answer()
        again.job.prompt = prompt + tokens[:7]
        runner.submit([again.job])
        assert again.answer()[0] == tokens[7:]
    finally:
        runner.close()
