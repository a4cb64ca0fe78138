"""The worker thread: its bounds, its fairness, its ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.errors import ContextTooLong, QueueFull, ShuttingDown
from engine.executor import BLOCK_SIZE, Executor, Outcome
from engine.runner import Event, Failed, Finished, Happened, Job, Progress, Prompted, Runner
from engine.sampling import SamplingParams
from engine.scheduler import Chunk, Scheduler
from tests.engine import checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.write(directory, max_position_embeddings=4096)
    return load_checkpoint(directory, name="tiny")


def made(
    checkpoint: Checkpoint,
    *,
    blocks: int = 256,
    running: int = 2,
    waiting: int = 2,
    executor: type[Executor] = Executor,
) -> Runner:
    """A runner over the tiny model; events are handed out on its own thread."""

    def deliver(happened: Happened) -> None:
        for job, event in happened:
            job.emit(event)

    books = BlockManager(blocks, BLOCK_SIZE, root=b"tiny")
    scheduler = Scheduler(books, max_running=running, max_waiting=waiting, token_budget=512, patience=30.0)
    computing = executor(checkpoint, SdpaBackend(), blocks=blocks, context=4096)
    return Runner(checkpoint, scheduler, computing, deliver=deliver)


@pytest.fixture
def runner(checkpoint: Checkpoint) -> Iterator[Runner]:
    runner = made(checkpoint)
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
        while isinstance(event := self.events.get(timeout=20), Prompted | Progress):
            if isinstance(event, Progress):
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
            case Prompted():
                pass
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


def test_answers_beyond_the_memory_take_turns_and_lose_nothing(checkpoint: Checkpoint) -> None:
    roomy, tight = made(checkpoint, running=4, waiting=8), made(checkpoint, blocks=6, running=4, waiting=8)
    answers = []
    for runner in (roomy, tight):
        try:
            runner.start()
            asked = [Asked(max_tokens=60, seed=seed, temperature=1.0) for seed in range(4)]
            for one in asked:
                runner.submit([one.job])
            answers.append([one.answer() for one in asked])
        finally:
            runner.close()
    assert answers[0] == answers[1]


def test_what_can_never_fit_is_refused_at_once(checkpoint: Checkpoint) -> None:
    runner = made(checkpoint, blocks=2)
    with pytest.raises(ContextTooLong, match="room for 32"):
        runner.submit([Asked(max_tokens=60).job])
    runner.close()


class Breaking(Executor):
    """Cannot compute token 66; has no memory for token 77."""

    def run(self, chunks: tuple[Chunk, ...]) -> Outcome:
        tokens = {token for chunk in chunks for token in chunk.sequence.prompt}
        if 77 in tokens:
            raise MemoryError
        if 66 in tokens:
            raise ArithmeticError("broken")
        return super().run(chunks)


def test_one_failing_answer_leaves_the_others_alone(checkpoint: Checkpoint) -> None:
    runner = made(checkpoint, running=3, waiting=8, executor=Breaking)
    alone = made(checkpoint)
    try:
        alone.start()
        expected = Asked()
        alone.submit([expected.job])
        good, bad, starved = Asked(), Asked(), Asked()
        bad.job.prompt, starved.job.prompt = [1, 66], [1, 77]
        runner.submit([good.job, bad.job, starved.job])  # not started: all three are in its first step
        runner.start()
        assert bad.answer()[1] == Failed("Generation failed: ArithmeticError.")
        failed = starved.answer()[1]
        assert isinstance(failed, Failed)
        assert (failed.status, failed.code) == (503, "out_of_memory")
        assert good.answer() == expected.answer()
        assert runner.sheds == 1
        assert runner.depth() == (0, 0)
    finally:
        runner.close()
        alone.close()


def test_the_second_time_a_prompt_is_known(runner: Runner) -> None:
    runner.start()
    cached = []
    for tenant in ("a", "a", "b"):
        asked = Asked()
        asked.job.prompt, asked.job.tenant = list(range(40)), tenant
        runner.submit([asked.job])
        first = asked.events.get(timeout=20)
        assert isinstance(first, Prompted)
        cached.append(first.cached)
        asked.answer()
    assert cached == [0, 32, 0]


def test_the_log_probabilities_of_a_prompt_are_those_of_drawing_it(runner: Runner) -> None:
    runner.start()
    drawn = Asked(logprobs=2, max_tokens=6)
    runner.submit([drawn.job])
    choices = []
    while not isinstance(event := drawn.events.get(timeout=20), Finished):
        if isinstance(event, Progress):
            choices.append(event.choice)
    scored = Asked(logprobs=2, max_tokens=0)
    scored.job.prompt, scored.job.prompt_logprobs = [1, 2, 3, *(choice.token for choice in choices)], True
    runner.submit([scored.job])
    prompted = scored.events.get(timeout=20)
    assert isinstance(prompted, Prompted)
    assert prompted.choices[0] is None
    for one, other in zip(prompted.choices[3:], choices, strict=True):
        assert one is not None
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.alternatives] == [token for token, _ in other.alternatives]
    assert scored.answer() == ([], Finished("length", "", 0))


def test_closing_cancels_and_refuses(checkpoint: Checkpoint) -> None:
    runner = made(checkpoint)
    runner.start()
    asked = Asked(max_tokens=4000)
    runner.submit([asked.job])
    asked.events.get(timeout=20)
    runner.close()
    assert not any(thread.name == "hitpath-engine" for thread in threading.enumerate())
    with pytest.raises(ShuttingDown):
        runner.submit([Asked().job])


def test_a_long_prompt_goes_in_chunks_and_gives_the_same_answer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    runner = made(checkpoint)
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
