"""What `/metrics` shows: under vLLM's names where the meaning is the same, under our own where it is not.

Per token almost nothing is done: the worker reports once per step, and what the books of the engine know anyway is read
when somebody asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.reuse.figures import Figures, reuse_metrics
from engine.runner import Event, Failed, Finished, Job, Progress, Prompted
from engine.scheduler import Step

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Buckets as vLLM has them, so that one dashboard adds both up."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine's own books say at one moment; the counts of what happened only ever rise."""

    running: int
    waiting: int
    preemptions: int
    free: int
    """Blocks, as `cached` (held by nobody, but findable) and `used`; together all there are."""
    cached: int
    used: int
    block_size: int
    """Tokens."""
    sheds: int
    """Answers given up for want of memory."""
    check_failures: int
    events_published: int = 0
    """Messages with KV events."""
    events_dropped: int = 0
    """KV events that were never sent."""
    repaired: int = 0
    """Tokens that chunks had brought, computed beside those drawn."""
    reuse: Figures | None = None
    """Of chunks; None: there is no operating point."""

    @property
    def blocks(self) -> int:
        """All there are."""
        return self.free + self.cached + self.used


class _Histogram:
    """One that takes many equal values at once. Written by one thread; read by any, at worst a value behind."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts up to each bound, and the sum of all values."""
        total, shown = 0.0, []
        for bound, count in zip((*map(float, self._bounds), float("inf")), tuple(self._counts), strict=True):
            total += count
            shown.append(("+Inf" if bound == float("inf") else str(bound), total))
        return shown, self._sum


@dataclass(slots=True)
class _Course:
    """When what happened to an answer."""

    arrived: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


class EngineMetrics(Collector):
    """Counts what the engine does; one registry per engine, so that two in one process do not meet.

    `arrived` before the jobs are submitted, then `refused` if they were not taken, and `ended` when nobody waits for
    them any more, on one thread. `scheduled` and `step` on the worker.
    """

    def __init__(
        self, model: str, state: Callable[[], EngineState], *, context: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`state` is asked whenever somebody looks. `context`: most tokens of an answer with its prompt."""
        self._labels = {"model_name": model, "engine": "0"}
        self._state, self._clock = state, clock
        self._courses: dict[Job, _Course] = {}
        self._ends: Tally[str] = Tally()
        self._prompt_tokens = self._cached_tokens = self._prefix_tokens = self._distinct_prompt_tokens = 0
        self._drawn = self._completed = 0
        self._first = _Histogram(_FIRST_TOKEN)
        self._gap = _Histogram(_BETWEEN_TOKENS)
        self._pace = _Histogram(_BETWEEN_TOKENS)
        self._whole, self._queued, self._decoding = _Histogram(_REQUEST), _Histogram(_REQUEST), _Histogram(_REQUEST)
        self._step_tokens = _Histogram(_STEP_TOKENS)
        self._prompts, self._answers = _Histogram(_up_to(context)), _Histogram(_up_to(context))
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "hitpath_engine_requests",
            "Requests by endpoint and status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._registry.register(self)

    def exposition(self) -> bytes:
        """The body of `/metrics`."""
        return generate_latest(self._registry)

    def request(self, endpoint: str, status: int) -> None:
        """A request over HTTP was answered."""
        self._requests.labels(endpoint, str(status)).inc()

    def arrived(self, jobs: Iterable[Job]) -> None:
        """These are about to be submitted."""
        now = self._clock()
        for job in jobs:
            self._courses[job] = _Course(now)

    def refused(self, jobs: Iterable[Job]) -> None:
        """These were not taken after all."""
        for job in jobs:
            self._courses.pop(job, None)

    def ended(self, jobs: Iterable[Job]) -> None:
        """Nobody waits for these any more; those that were not finished have been given up."""
        for job in jobs:
            if self._courses.pop(job, None) is not None:
                self._ends["abort"] += 1

    def scheduled(self, step: Step) -> None:
        """A step is about to be computed."""
        now = self._clock()
        self._step_tokens.add(sum(chunk.size for chunk in step.chunks))
        for chunk in step.chunks:
            row = chunk.sequence
            if chunk.start == row.cached and not row.preemptions:  # its first piece
                self._queued.add(max(0.0, now - row.arrived))

    def step(self, happened: Iterable[tuple[Job, Event]]) -> None:
        """What a step brought."""
        now = self._clock()
        # Most answers of a step got their last token at the same moment: one entry with a weight does for all.
        before: Tally[float] = Tally()
        for job, event in happened:
            if (course := self._courses.get(job)) is None:
                continue  # given up meanwhile
            match event:
                case Progress():
                    if course.tokens:
                        before[course.last] += 1
                    course.tokens, course.last = course.tokens + 1, now
                    self._drawn += 1
                case Prompted():
                    self._prompted(job, course, event, now)
                case Finished(reason, _, tokens):
                    self._drawn += tokens - course.tokens  # one that ends an answer has no event of its own
                    self._finished(job, course, reason, tokens, now)
                case Failed():
                    self._courses.pop(job, None)
                    self._ends["error"] += 1
                case _ as never:
                    assert_never(never)
        for last, times in before.items():
            self._gap.add(now - last, times)

    def collect(self) -> Iterator[Metric]:
        """Every figure but those of the registry's own counters."""
        state = self._state()
        yield from self._books(state)
        yield from self._counts(state)
        yield from self._histograms()
        if state.reuse is not None:
            yield from reuse_metrics(state.reuse)
            text = "Tokens of chunks computed again beside tokens drawn."
            yield CounterMetricFamily("hitpath_engine_reuse_repaired", text, state.repaired)

    def _prompted(self, job: Job, course: _Course, event: Prompted, now: float) -> None:
        course.first = course.last = now
        self._first.add(now - course.arrived)
        self._prompts.add(len(job.prompt))
        self._prompt_tokens += len(job.prompt)
        self._prefix_tokens += event.cached
        self._cached_tokens += event.cached + event.kept
        if job.parent is None:
            self._distinct_prompt_tokens += len(job.prompt)

    def _finished(self, job: Job, course: _Course, reason: str, tokens: int, now: float) -> None:
        if self._courses.pop(job, None) is None:
            return
        self._ends[reason] += 1
        self._completed += tokens
        self._answers.add(tokens)
        self._whole.add(now - course.arrived)
        self._decoding.add(now - course.first)
        if tokens > 1:
            self._pace.add((now - course.first) / (tokens - 1))

    def _books(self, state: EngineState) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Answers that are computed.", state.running)
        yield self._gauge("vllm:num_requests_waiting", "Answers that wait.", state.waiting)
        used = state.used / state.blocks if state.blocks else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that are in use; 1 is all.", used)
        size = {"block_size": str(state.block_size), "num_gpu_blocks": str(state.blocks), "engine": "0"}
        yield _labelled(GaugeMetricFamily("vllm:cache_config_info", "The KV memory.", labels=list(size)), size, 1)
        yield GaugeMetricFamily("hitpath_engine_running", "Answers that are running.", state.running)
        yield GaugeMetricFamily("hitpath_engine_waiting", "Answers that are waiting.", state.waiting)
        blocks = GaugeMetricFamily("hitpath_engine_blocks", "KV blocks by where they are.", labels=["state"])
        for name, count in (("free", state.free), ("cached", state.cached), ("used", state.used)):
            blocks.add_metric([name], count)
        yield blocks
        yield GaugeMetricFamily("hitpath_engine_block_capacity", "KV blocks there are.", state.blocks)

    def _counts(self, state: EngineState) -> Iterator[Metric]:
        ours, vllm = CounterMetricFamily, self._counter
        yield vllm("vllm:prefix_cache_queries", "Prompt tokens that were looked up.", self._prompt_tokens)
        yield vllm("vllm:prefix_cache_hits", "Prompt tokens that were known.", self._prefix_tokens)
        yield vllm("vllm:prompt_tokens", "Prompt tokens, known ones too.", self._prompt_tokens)
        yield vllm("vllm:prompt_tokens_cached", "Prompt tokens that were not computed.", self._cached_tokens)
        yield vllm("vllm:generation_tokens", "Tokens drawn.", self._drawn)
        yield vllm("vllm:num_preemptions", "Answers set back for want of KV blocks.", state.preemptions)
        ends = CounterMetricFamily(
            "vllm:request_success", "Answers by how they ended.", labels=[*self._labels, "finished_reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            ends.add_metric([*self._labels.values(), reason], self._ends[reason])
        yield ends
        tokens = ours("hitpath_engine_tokens", "Tokens read and written in whole answers.", labels=["kind"])
        tokens.add_metric(["prompt"], self._distinct_prompt_tokens)
        tokens.add_metric(["completion"], self._completed)
        yield tokens
        yield ours("hitpath_engine_out_of_memory", "Answers given up for want of memory.", state.sheds)
        yield ours("hitpath_engine_check_failures", "Times the blocks' books were wrong.", state.check_failures)
        yield ours("hitpath_engine_kv_events_messages", "Messages of KV events sent.", state.events_published)
        yield ours("hitpath_engine_kv_events_dropped", "KV events never sent.", state.events_dropped)

    def _histograms(self) -> Iterator[Metric]:
        first = "Seconds from arrival to the first token."
        yield self._histogram("vllm:time_to_first_token_seconds", first, self._first)
        yield self._histogram("vllm:inter_token_latency_seconds", "Seconds from token to token.", self._gap)
        pace = "Seconds per token after the first, by answer."
        yield self._histogram("vllm:request_time_per_output_token_seconds", pace, self._pace)
        yield self._histogram("vllm:e2e_request_latency_seconds", "Seconds from arrival to the end.", self._whole)
        yield self._histogram(
            "vllm:request_queue_time_seconds", "Seconds from arrival to the first step.", self._queued
        )
        yield self._histogram("vllm:request_decode_time_seconds", "Seconds from first token to last.", self._decoding)
        yield self._histogram("vllm:request_prompt_tokens", "Prompt tokens of an answer.", self._prompts)
        yield self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", self._answers)
        yield self._histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", self._step_tokens)
        buckets, total = self._first.buckets()
        yield HistogramMetricFamily("hitpath_engine_first_token_seconds", first, buckets, total)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _labelled(GaugeMetricFamily(name, text, labels=list(self._labels)), self._labels, value)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return _labelled(CounterMetricFamily(name, text, labels=list(self._labels)), self._labels, value)

    def _histogram(self, name: str, text: str, values: _Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=list(self._labels))
        buckets, total = values.buckets()
        family.add_metric(list(self._labels.values()), buckets, total)
        return family


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, labels: dict[str, str], value: float
) -> GaugeMetricFamily | CounterMetricFamily:
    family.add_metric(list(labels.values()), value)
    return family


def _up_to(most: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    steps = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
    return [float(step) for step in steps if step <= most]
