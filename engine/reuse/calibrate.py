"""Which selector, at which ratio, on which kind of stored chunks, costs least and loses no more than was stated.

Every sample is computed in full and answered greedily; then its chunks, as they would come out of the store, are reused
in every way, and the same tokens are scored again: those behind the last chunk and those of the answer. That the
answer's tokens are all the likeliest ones again means that the same answer would be written.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cachestore.kv.codecs import CODECS, Form
from engine.checkpoint import Checkpoint
from engine.reuse.blending import Blend, Selector
from engine.reuse.cachecraft import Observer, in_order
from engine.reuse.chunks import BlendPrompt, ChunkKv, Placed
from engine.reuse.examples import Sample
from engine.reuse.idle import PIECE
from engine.reuse.known import name_of
from engine.reuse.point import Loss, SelectorName, Stored, selector_of
from engine.reuse.sensitivity import averaged, measured
from engine.reuse.trial import Trial, operations
from engine.reuse.writing import note_of, read_note

ANSWER = 16
"""Tokens of the continuation that is compared."""
_ENDING = 64
"""Tokens before it that are compared, at the most."""
_RATIOS = (0.05, 0.10, 0.15, 0.20, 0.30)
_REPAIR = 4
"""Tokens repaired beside each one drawn, where any are."""
_NEAR = 1.05
"""Times, or operations, that are so near to each other count as the same: then the smaller loss decides."""
_WORTH = 0.9
"""A point that takes more of full prefill's time is none: there are chunks to load, too."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be lost."""

    kl: float
    """Nats: mean over the compared tokens, and one standard error above it."""
    agreement: float
    """Least share of the answers' tokens that stay the likeliest."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of reusing."""

    selector: SelectorName
    ratio: float
    stored: Stored
    repair: int = 0
    """Kept tokens computed beside each one drawn."""


@dataclass(slots=True)
class Findings:
    """What was measured of a candidate, a number a sample."""

    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    """Relative to computing everything, as are operations."""
    operations: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Standard error of the mean divergence."""
        return statistics.stdev(self.kl) / math.sqrt(len(self.kl)) if len(self.kl) > 1 else math.inf

    @property
    def loss(self) -> Loss:
        """The means, and the median time."""
        return Loss(statistics.fmean(self.kl), statistics.fmean(self.agreement), statistics.median(self.time))

    def within(self, limits: Limits) -> bool:
        """Whether it loses no more."""
        return self.loss.kl + self.error <= limits.kl and self.loss.agreement >= limits.agreement


@dataclass(frozen=True, slots=True, eq=False)
class _Tried:
    """What came of a candidate on one sample."""

    scores: Tensor
    """[T, V], of the end of the prompt and the answer."""
    seconds: float
    operations: float


Table = dict[Candidate, Findings]


def grid() -> list[Candidate]:
    """All that is tried. Cache-Craft asks for chunks as they were seen; at .5 it is what its paper has."""
    found = []
    stores: tuple[Stored, ...] = ("mean", "head", "seen", "alone")
    for stored in stores:
        found += [Candidate("none", 0.0, stored), Candidate("early", 0.0, stored), Candidate("early", 0.05, stored)]
        for ratio in _RATIOS:
            names: tuple[SelectorName, ...] = ("sensitive", "epic", "cacheblend", "kvshare")
            found += [Candidate(name, ratio, stored) for name in names]
            found.append(Candidate("kvshare", ratio, stored, _REPAIR))
    return [*found, *(Candidate("cachecraft", ratio, "seen") for ratio in (*_RATIOS, 0.5))]


def chosen(table: Table, limits: Limits) -> Candidate | None:
    """The one that saves most time within the limits; None: there is none that saves any."""
    fit = [one for one, found in table.items() if found.within(limits) and found.loss.relative_time <= _WORTH]
    if not fit:
        return None
    quickest = min(fit, key=lambda one: table[one].loss.relative_time)
    return min((one for one in fit if _as_quick(table[one], table[quickest])), key=lambda one: table[one].loss.kl)


def _as_quick(found: Findings, quickest: Findings) -> bool:
    """Clocks err, counts do not: what computes no more is as quick."""
    if found.loss.relative_time <= quickest.loss.relative_time * _NEAR:
        return True
    return statistics.fmean(found.operations) <= statistics.fmean(quickest.operations) * _NEAR


def nearest(table: Table, limits: Limits) -> Candidate:
    """The one that comes nearest to the limits, whatever it costs."""

    def beyond(one: Candidate) -> float:
        found = table[one]
        return max((found.loss.kl + found.error) / limits.kl, (1 - found.loss.agreement) / (1.001 - limits.agreement))

    return min(table, key=beyond)


class Calibration:
    """One model, and room for its longest sample."""

    def __init__(self, checkpoint: Checkpoint, samples: Sequence[Sample], codec: str) -> None:
        longest = max(len(sample.tokens) for sample in samples) + ANSWER
        largest = max(len(chunk) for sample in samples for chunk in sample.chunks)
        self._checkpoint, self._samples, self._codec = checkpoint, samples, CODECS[codec]
        # A chunk is also computed behind two others, and all of a prompt's chunks behind another.
        self._trial, self._store = Trial(checkpoint, longest), Trial(checkpoint, longest + 2 * largest)

    def run(self, candidates: Sequence[Candidate]) -> Iterator[Table]:
        """The findings so far, after every sample."""
        table: Table = {candidate: Findings() for candidate in candidates}
        for index, sample in enumerate(self._samples):
            self._measure(sample, self._foreign(index), table)
            yield table

    def _foreign(self, index: int) -> list[tuple[int, ...]]:
        """Two texts that are not in this sample: chunks of others, or where there are none, its own backwards."""
        own = set(self._samples[index].chunks)
        turned = (*self._samples[index + 1 :], *self._samples[:index])
        others = [chunk for sample in turned for chunk in sample.chunks if chunk not in own]
        return (list(dict.fromkeys(others)) or [chunk[::-1] for chunk in own])[:2]

    def _measure(self, sample: Sample, foreign: Sequence[tuple[int, ...]], table: Table) -> None:
        answer = self._trial.continued(sample.tokens, ANSWER, lambda scores: int(scores.argmax()))
        text = (*sample.tokens, *answer[:-1])
        last = min(len(sample.tokens) - sample.spans[-1][1], _ENDING) + ANSWER - 1
        exact = self._trial.compute(text, last)
        whole_time = _seconds(lambda: self._trial.compute(text, last))
        config = self._checkpoint.config
        whole = operations(config, [torch.arange(len(text))] * config.layers)
        stored = self._stored(sample, foreign)
        for candidate, found in table.items():
            tried = self._tried(candidate, text, sample, stored[candidate.stored], last)
            same = tried.scores.argmax(-1) == exact.argmax(-1)
            found.kl.append(_divergence(exact, tried.scores))
            found.agreement.append(float(same[-ANSWER:].float().mean()))
            found.first.append(bool(same[-ANSWER]))
            found.time.append(tried.seconds / whole_time)
            found.operations.append(tried.operations / whole)

    def _tried(
        self, candidate: Candidate, text: Sequence[int], sample: Sample, chunks: Sequence[ChunkKv], last: int
    ) -> _Tried:
        prompt, selector = _placed(text, sample, chunks), selector_of(candidate.selector, candidate.ratio)
        blend = Blend(prompt, selector, last)
        scores = self._trial.run(prompt, blend, last)
        seconds = _seconds(lambda: self._trial.blend(prompt, selector, last))
        tried = _Tried(scores, seconds, operations(self._checkpoint.config, blend.positions))
        if not candidate.repair:
            return tried
        begun = _placed(sample.tokens, sample, chunks)
        return self._repaired(tried, begun, selector, text[len(sample.tokens) :], candidate.repair)

    def _repaired(
        self, tried: _Tried, prompt: BlendPrompt, selector: Selector, answer: Sequence[int], repair: int
    ) -> _Tried:
        """The same, the answer drawn token after token with so many kept tokens repaired beside each.

        Time and operations of the repairs are added to those of prompt and answer in one go.
        """
        config, last = self._checkpoint.config, len(tried.scores) - len(answer)
        blend = Blend(prompt, selector, last, ranked=True)
        begun, text, first = self._trial.run(prompt, blend, last), (*prompt.tokens, *answer), len(prompt.tokens)
        order = blend.repairs.tolist()
        steps = [sorted(order[at * repair : (at + 1) * repair]) for at in range(len(answer))]
        scores = torch.cat((begun, self._trial.decoded(text, first, steps)))
        alone: list[list[int]] = [[] for _ in steps]
        took = [_seconds(lambda s=s: self._trial.decoded(text, first, s)) for s in (steps, alone)]  # type: ignore[misc]
        rows = torch.tensor([at for again in steps for at in again], dtype=torch.int64)
        counted = tried.operations + operations(config, [rows] * config.layers)
        return _Tried(scores, tried.seconds + max(0.0, took[0] - took[1]), counted)

    def _stored(self, sample: Sample, foreign: Sequence[tuple[int, ...]]) -> dict[Stored, list[ChunkKv]]:
        seen = self._seen(sample, foreign[0])
        stored: dict[Stored, list[ChunkKv]] = {"alone": [], "head": [], "mean": [], "seen": []}
        for chunk in sample.chunks:
            elsewhere = [self._store.chunk(chunk, after=(*sample.head, *other)) for other in foreign]
            head = self._store.chunk(chunk, after=sample.head)
            stored["alone"].append(measured(self._store.chunk(chunk), elsewhere))
            stored["head"].append(measured(head, elsewhere))
            stored["mean"].append(averaged(elsewhere))
            stored["seen"].append(measured(seen[chunk], elsewhere))
        return {kind: [self._kept(chunk) for chunk in chunks] for kind, chunks in stored.items()}

    def _seen(self, sample: Sample, foreign: tuple[int, ...]) -> dict[tuple[int, ...], ChunkKv]:
        """As an earlier prompt had them, in another order behind a text that is not in this one."""
        whole, places = list(sample.head), {}
        for chunk in (foreign, *reversed(sample.chunks)):
            places[chunk] = len(whole)
            whole += chunk
        texts = in_order(whole, ((start, name_of(chunk)) for chunk, start in places.items()))
        observer = Observer(texts, len(whole), self._checkpoint.config.windows)
        for _ in self._store.pieces(whole, PIECE, observer):
            pass
        spans = {chunk: (start, start + len(chunk)) for chunk, start in places.items()}
        return {chunk: self._store.taken(whole, *span, observer.context(*span)) for chunk, span in spans.items()}

    def _kept(self, chunk: ChunkKv) -> ChunkKv:
        """As it comes back from where it is kept."""
        kv = torch.stack(chunk.layers).cpu()
        form = Form(kv.shape[0], kv.shape[2], kv.shape[3], kv.shape[4], kv.dtype)
        back = self._codec.decode(self._codec.encode(kv, form, chunk.sensitivity), form).to(chunk.layers[0].device)
        noted = read_note(note_of(chunk, refined=True), len(chunk.tokens))
        return replace(chunk, layers=tuple(back), context=noted.context)


def table_of(table: Table, best: Candidate | None) -> str:
    """For people: quickest first."""
    lines = [
        f"{'stored':7}{'selector':12}{'ratio':>6}{'repair':>7}{'KL':>10}{'±':>9}{'agree':>7}{'first':>7}{'time':>7}{'ops':>7}"
    ]
    for one, found in sorted(table.items(), key=lambda pair: pair[1].loss.relative_time):
        loss = found.loss
        lines.append(
            f"{one.stored:7}{one.selector:12}{one.ratio:6.2f}{one.repair:7}{loss.kl:10.2e}{found.error:9.1e}{loss.agreement:7.3f}"
            f"{statistics.fmean(found.first):7.3f}{loss.relative_time:7.2f}{statistics.fmean(found.operations):7.2f}"
            f"{'  <' if one == best else ''}"
        )
    return "\n".join(lines)


def _placed(text: Sequence[int], sample: Sample, chunks: Iterable[ChunkKv]) -> BlendPrompt:
    pairs = list(zip(sample.spans, chunks, strict=True))
    texts = in_order(text, ((start, name_of(chunk.tokens)) for (start, _), chunk in pairs))
    return BlendPrompt(text, tuple(Placed(chunk, start, 0, stop - start) for (start, stop), chunk in pairs), texts)


def _divergence(exact: Tensor, other: Tensor) -> float:
    """KL(exact ‖ other), nats, mean over rows of scores [T, V]."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).nan_to_num().sum(-1).mean()))


def _seconds(run: Callable[[], Tensor]) -> float:
    """Of what has run once before."""
    _finish()
    began = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - began


def _finish() -> None:
    """What a GPU was told is done later."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
