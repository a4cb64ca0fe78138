"""What the engine counts, read the way Prometheus reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.metrics import EngineMetrics, EngineState
from engine.runner import Failed, Finished, Job, Progress, Prompted
from engine.sampling import Choice, SamplingParams
from engine.scheduler import Chunk, Step
from engine.sequence import Sequence

STATE = EngineState(
    running=3,
    waiting=2,
    preemptions=5,
    free=10,
    cached=50,
    used=40,
    block_size=16,
    sheds=1,
    check_failures=0,
    events_published=7,
    events_dropped=8,
)
LABELS = 'engine="0",model_name="tiny"'
TOKEN = Progress("x", Choice(1, 0.0, ()))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """The metrics of an engine whose time stands still until a test moves it."""

    def __init__(self) -> None:
        self.clock, self.state = Clock(), STATE
        self.metrics = EngineMetrics("tiny", lambda: self.state, context=4096, clock=self.clock)

    def arrive(self, prompt: int = 10, *, parent: Job | None = None) -> Job:
        job = Job([1] * prompt, SamplingParams(), lambda _: None, parent=parent)
        self.metrics.arrived([job])
        return job

    def after(self, seconds: float) -> EngineMetrics:
        self.clock.now += seconds
        return self.metrics

    def read(self) -> dict[str, float]:
        families = text_string_to_metric_families(self.metrics.exposition().decode())
        return {_name(sample.name, sample.labels): sample.value for family in families for sample in family.samples}


def _name(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
    return f"{name}{{{inside}}}" if inside else name


def row(prompt: int, *, cached: int = 0, arrived: float = 100.0) -> Sequence:
    sequence = Sequence([1] * prompt, SamplingParams())
    sequence.cached, sequence.arrived = cached, arrived
    return sequence


def test_the_books_are_shown_as_they_are_now() -> None:
    engine = Engine()
    found = engine.read()
    assert found[f"vllm:num_requests_running{{{LABELS}}}"] == 3
    assert found[f"vllm:num_requests_waiting{{{LABELS}}}"] == 2
    assert found[f"vllm:kv_cache_usage_perc{{{LABELS}}}"] == pytest.approx(0.4)
    assert found[f"vllm:num_preemptions_total{{{LABELS}}}"] == 5
    assert found['vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"}'] == 1
    assert found['hitpath_engine_blocks{state="free"}'] == 10
    assert found['hitpath_engine_blocks{state="cached"}'] == 50
    assert found['hitpath_engine_blocks{state="used"}'] == 40
    assert found["hitpath_engine_block_capacity"] == 100
    assert found["hitpath_engine_out_of_memory_total"] == 1
    assert found["hitpath_engine_check_failures_total"] == 0
    assert found["hitpath_engine_kv_events_messages_total"] == 7
    assert found["hitpath_engine_kv_events_dropped_total"] == 8
    engine.state = replace(STATE, running=0, check_failures=2)
    found = engine.read()
    assert found["hitpath_engine_running"] == found[f"vllm:num_requests_running{{{LABELS}}}"] == 0
    assert found["hitpath_engine_check_failures_total"] == 2


def test_an_answer_is_timed_from_its_arrival() -> None:
    engine = Engine()
    job = engine.arrive(prompt=100)
    engine.after(2).step([(job, Prompted(64)), (job, TOKEN)])
    engine.after(0.03).step([(job, TOKEN)])
    engine.after(0.05).step([(job, TOKEN), (job, Finished("length", "", 3))])
    found = engine.read()
    for name, total, count in (
        ("time_to_first_token_seconds", 2, 1),
        ("inter_token_latency_seconds", 0.08, 2),
        ("request_time_per_output_token_seconds", 0.04, 1),
        ("e2e_request_latency_seconds", 2.08, 1),
        ("request_decode_time_seconds", 0.08, 1),
        ("request_prompt_tokens", 100, 1),
        ("request_generation_tokens", 3, 1),
    ):
        assert found[f"vllm:{name}_sum{{{LABELS}}}"] == pytest.approx(total), name
        assert found[f"vllm:{name}_count{{{LABELS}}}"] == count, name
    gap = "vllm:inter_token_latency_seconds_bucket"
    assert [found[f'{gap}{{engine="0",le="{le}",model_name="tiny"}}'] for le in ("0.025", "0.05", "+Inf")] == [0, 2, 2]
    assert found["hitpath_engine_first_token_seconds_count"] == 1
    assert found[f"vllm:prefix_cache_queries_total{{{LABELS}}}"] == 100
    assert found[f"vllm:prefix_cache_hits_total{{{LABELS}}}"] == 64
    assert found[f"vllm:prompt_tokens_total{{{LABELS}}}"] == 100
    assert found[f"vllm:generation_tokens_total{{{LABELS}}}"] == 3
    assert found['hitpath_engine_tokens_total{kind="completion"}'] == 3
    assert found['vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'] == 1


def test_answers_of_one_step_count_each() -> None:
    engine = Engine()
    first = engine.arrive(prompt=50)
    second, third = engine.arrive(prompt=50, parent=first), engine.arrive(prompt=7)
    jobs = (first, second, third)
    engine.after(1).step([event for job in jobs for event in ((job, Prompted(0)), (job, TOKEN))])
    engine.after(0.1).step([(job, TOKEN) for job in jobs])
    engine.after(0.1).step([(job, Finished("stop", "", 3)) for job in jobs])  # by a token that is not shown
    found = engine.read()
    assert found[f"vllm:inter_token_latency_seconds_count{{{LABELS}}}"] == 3
    assert found[f"vllm:generation_tokens_total{{{LABELS}}}"] == 9
    assert found[f"vllm:prompt_tokens_total{{{LABELS}}}"] == 107
    assert found['hitpath_engine_tokens_total{kind="prompt"}'] == 57
    assert found['hitpath_engine_tokens_total{kind="completion"}'] == 9


def test_every_answer_ends_in_one_way() -> None:
    engine = Engine()
    jobs = [engine.arrive() for _ in range(5)]
    done, broken, left, never, refused = jobs
    engine.metrics.refused([refused])
    engine.after(1).step([(job, event) for job in (done, broken, left) for event in (Prompted(0), TOKEN)])
    engine.after(1).step([(done, Finished("stop", "", 1)), (broken, Failed("out of luck"))])
    engine.metrics.ended([done, broken, left, never])
    engine.after(1).step([(left, TOKEN), (left, Finished("stop", "", 2))])  # was on its way when it was given up
    found = engine.read()
    ends = {
        reason: found[f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="tiny"}}']
        for reason in ("stop", "length", "abort", "error")
    }
    assert ends == {"stop": 1, "length": 0, "abort": 2, "error": 1}
    assert found['hitpath_engine_tokens_total{kind="completion"}'] == 1


def test_steps_tell_their_tokens_and_how_long_the_first_piece_waited() -> None:
    engine = Engine()
    fresh, known, again = row(600, arrived=100.0), row(100, cached=64, arrived=101.0), row(30, arrived=0.0)
    again.preemptions = 1
    chunks = (Chunk(fresh, 0, 500, False), Chunk(known, 64, 36, True), Chunk(again, 0, 30, True))
    engine.after(3).scheduled(Step(chunks, (), ()))
    engine.after(1).scheduled(Step((Chunk(known, 100, 1, True), Chunk(fresh, 500, 100, True)), (), ()))
    found = engine.read()
    assert found[f"vllm:iteration_tokens_total_count{{{LABELS}}}"] == 2
    assert found[f"vllm:iteration_tokens_total_sum{{{LABELS}}}"] == 566 + 101
    assert found[f"vllm:request_queue_time_seconds_count{{{LABELS}}}"] == 2
    assert found[f"vllm:request_queue_time_seconds_sum{{{LABELS}}}"] == 3 + 2


def test_requests_are_counted_by_endpoint_and_status() -> None:
    engine = Engine()
    engine.metrics.request("chat", 200)
    engine.metrics.request("chat", 200)
    engine.metrics.request("completions", 429)
    found = engine.read()
    assert found['hitpath_engine_requests_total{endpoint="chat",status="200"}'] == 2
    assert found['hitpath_engine_requests_total{endpoint="completions",status="429"}'] == 1


def test_two_engines_of_one_process_do_not_meet() -> None:
    one, other = Engine(), Engine()
    one.metrics.request("chat", 200)
    assert b'endpoint="chat"' not in other.metrics.exposition()
