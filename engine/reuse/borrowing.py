"""What one prompt has of the library: the texts found in it, on their way or there, and what is kept of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from engine.attention import KvPool
from engine.reuse.blending import Selector
from engine.reuse.cachecraft import familiar, overhead
from engine.reuse.chunks import BlendPrompt, Placed, names_before
from engine.reuse.fetching import Fetch
from engine.reuse.figures import SHOWN
from engine.reuse.hot import Held
from engine.reuse.idle import Check
from engine.reuse.known import Match
from engine.reuse.steps import Blended
from engine.sequence import TIERS, Used
from engine.sequence import Sequence as Row

if TYPE_CHECKING:
    from engine.reuse.library import Library
    from engine.runner import Job


_log = logging.getLogger("hitpath.engine")


@dataclass(frozen=True, slots=True, eq=False)
class Want:
    """A text in the prompt, and where its chunk is."""

    match: Match
    held: Held | None
    order: int | None
    """Place among what is fetched, where it is not held."""


@dataclass(frozen=True, slots=True, eq=False)
class Keeping:
    """A marked text that a prompt computed, and where in the pool it lies until something else is computed."""

    job: Job
    start: int
    stop: int
    slots: Tensor
    """int64 [stop - start]."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A chunk to be placed."""

    want: Want
    held: Held
    """Perhaps without its layers."""
    placed: Placed
    order: int | None
    """Its layers come from the fetch."""
    tier: str


class _Coming:
    """Layers of chunks of which some are there and others come; see `engine.reuse.steps.Source`."""

    def __init__(self, fetch: Fetch, parts: Sequence[_Part]) -> None:
        self._fetch, self._parts = fetch, parts

    def layer(self, index: int) -> Sequence[Tensor | None]:
        return [
            part.placed.chunk.layers[index] if part.order is None else self._fetch.layer(part.order, index)
            for part in self._parts
        ]


class Borrowing:
    """See `engine.sequence.Reuse`."""

    def __init__(
        self,
        library: Library,
        job: Job,
        wants: Sequence[Want],
        fetch: Fetch | None,
        texts: tuple[tuple[int, bytes], ...] = (),
    ) -> None:
        """`texts`: see `BlendPrompt`; only where context indices are kept."""
        self._library, self._job, self._wants, self._fetch, self._texts = library, job, wants, fetch, texts
        self._first = len(job.prompt)
        """First token computed since the last admission."""
        self._parts: list[_Part] = []
        self._shadow: Blended | None = None
        """What would have been placed, of a prompt that is checked though chunks are not reused."""
        self._used = Used()

    @property
    def used(self) -> Used:
        """See `Reuse`."""
        return self._used

    def held(self, idle: bool) -> bool:
        """See `Reuse`."""
        fetch = self._fetch
        return fetch is not None and not fetch.over and not (idle and fetch.planned)

    def likely(self, first: int) -> int:
        """See `Reuse`."""
        if not self._library.gate.open:
            return 0
        found = sum(max(0, want.match.stop - max(want.match.start, first)) for want in self._wants)
        return int(found * (1 - self._library.point.ratio))

    def admitted(self, sequence: Row) -> Blended | None:
        """See `Reuse`."""
        try:
            return self._admitted(sequence)
        except Exception:  # whatever it is, the prompt can be computed
            _log.exception("chunks could not be placed")
            self._parts = []
            return None

    def _admitted(self, sequence: Row) -> Blended | None:
        self._first, self._shadow, self._used = sequence.computed, None, Used()
        self._parts = [part for want in self._wants if (part := self._part(want)) is not None]
        if not self._parts:
            return None
        blended = self._blended()
        if self._library.gate.open:
            return blended
        # Checks go on, or nobody would ever know that chunks may be reused again.
        if blended.source is None and self._library.sampled():
            self._shadow = blended
        return None

    def released(self, sequence: Row) -> None:
        """See `Reuse`."""
        self._parts, self._shadow, self._first = [], None, len(self._job.prompt)
        if self._fetch is not None:
            self._fetch.close()
            self._fetch = None

    def prefilled(self, sequence: Row, pool: KvPool, slots: Tensor) -> None:
        """See `Reuse`."""
        blended = sequence.blended
        if blended is not None:
            self._account(blended, sequence)
        new = list(self._new(blended))
        for start, stop in new:
            self._library.keep(Keeping(self._job, start, stop, slots[start:stop]))
        for part in self._parts:
            if part.order is not None and self._fetch is not None:
                self._library.fetched(self._fetch, part.order)
            self._library.refine(part.want.match, self._job)
        if self._texts:
            self._library.observe(self._job, self._texts, [*new, *self._strange()])

    def scored(self, sequence: Row, scores: Tensor) -> None:
        """See `Reuse`."""
        if self._shadow is not None:
            self._library.compare(Check(self._job.prompt, scores.clone(), self._shadow))
        elif self._used.chunks and self._library.sampled():
            self._library.compare(Check(self._job.prompt, scores.clone()))

    def _new(self, blended: Blended | None) -> Iterator[tuple[int, int]]:
        """What of the marked texts was neither known as a prefix nor brought by chunks, and is worth keeping."""
        placed = () if blended is None else blended.prompt.placed
        for span in self._job.spans:
            start = max(span[0], self._first)
            borders = [(piece.start, piece.stop) for piece in placed if piece.stop > start and piece.start < span[1]]
            for before, after in (*borders, (span[1], span[1])):
                if (start, before) == span or before - start >= self._library.point.least:
                    yield start, before
                start = after

    def _strange(self) -> Iterator[tuple[int, int]]:
        """What stands here whole, and of which no version is from a context like this one."""
        for part in self._parts:
            match, context = part.want.match, part.placed.chunk.context
            whole = (match.offset, match.stop - match.start) == (0, len(match.tokens))
            if whole and not familiar(context, self._before(match)):
                yield match.start, match.stop

    def _before(self, match: Match) -> tuple[bytes, ...]:
        """Names of the texts before one."""
        return names_before(self._texts, match.start)

    def _account(self, blended: Blended, sequence: Row) -> None:
        kept = 0 if sequence.kept is None else len(sequence.kept)
        recomputed = int(blended.prompt.reused.sum()) - kept
        tier = max((self._tier(part) for part in self._parts), key=TIERS.index)
        self._used = Used(len(self._parts), kept, recomputed, tier)
        self._library.count(self._used, [part.placed.chunk for part in self._parts if part.tier == "pool"])
        for part in self._parts:
            match = part.want.match
            cost = overhead(part.placed.chunk.context, self._before(match))
            self._library.versions.used(match.text, part.held.slot, cost)

    def _tier(self, part: _Part) -> str:
        """Where a chunk came from in the end."""
        coming = part.order is not None and self._fetch is not None
        return SHOWN[self._fetch.tiers[part.order]] if coming else part.tier  # type: ignore[union-attr,index]

    def _part(self, want: Want) -> _Part | None:
        """A text's chunk where the prompt has to be computed; None: it is of no use, lost or not there yet."""
        match, first = want.match, self._first
        before = max(0, first - match.start)
        if match.start + before >= match.stop:
            return None
        held, order, tier = self._held(want)
        if held is None:
            return None
        count = match.stop - match.start - before
        placed = Placed(held.chunk, match.start + before, match.offset + before, count, match.text.name)
        return _Part(want, held, placed, order, tier)

    def _held(self, want: Want) -> tuple[Held | None, int | None, str]:
        """The chunk, where its layers come from if they are not there, and its tier."""
        if want.held is not None:
            return want.held, None, "pool"
        fetch, order = self._fetch, want.order
        if fetch is None or order is None:
            return self._library.hot.get(want.match.text, self._before(want.match)), None, "pool"
        if not fetch.planned or (noted := fetch.note(order)) is None:
            return None, None, "none"
        tier = SHOWN[fetch.tiers[order]]
        if fetch.over:
            return self._library.fetched(fetch, order), None, tier
        return Held(noted.chunk(want.match.tokens), noted.refined, noted.slot), order, tier

    def _blended(self) -> Blended:
        prompt = BlendPrompt(self._job.prompt, tuple(part.placed for part in self._parts), self._texts)
        ranked = self._library.point.repair > 0
        coming = self._fetch is not None and any(part.order is not None for part in self._parts)
        if not coming or self._fetch is None:
            return Blended(prompt, self._selector(None), ranked=ranked)
        return Blended(prompt, self._selector(self._fetch.ratio), _Coming(self._fetch, self._parts), ranked)

    def _selector(self, ratio: float | None) -> Selector:
        return self._library.point.made(ratio)
