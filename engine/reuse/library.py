"""The chunks of all prompts: found where they stand again, fetched, and kept when they were computed.

`Library` is what the runner asks; `Borrowing` is what one prompt has of it. Three tiers answer: decoded chunks on the
model's device (`hot`), the store below (`cachestore.kv`), and, in it, whatever it is opened on.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from cachestore.kv import Chunk, Gone, Happening, Kept, Key, KvStore, Slot, Transfer, salt
from cachestore.kv.controller import Controller, Plan, Source, Wanted
from cachestore.kv.threads import Workers, alone
from engine.attention import AttentionBackend, KvPool
from engine.checkpoint import Checkpoint
from engine.reuse.borrowing import Borrowing, Keeping, Want
from engine.reuse.cachecraft import in_order, unfit
from engine.reuse.chunks import ChunkKv, names_before
from engine.reuse.fetching import Fetch, Order
from engine.reuse.figures import Figures
from engine.reuse.gate import Gate
from engine.reuse.hot import Held, Hot, size_of
from engine.reuse.idle import LONGEST, Check, Compared, IdleJobs, Observation, Refinement
from engine.reuse.known import ChunkEvent, ChunkRemoved, ChunkStored, Known, Match, Text, name_of, text_of
from engine.reuse.placing import take
from engine.reuse.point import OperatingPoint
from engine.reuse.versions import Versions
from engine.reuse.writing import REFINED, SEEN, note_of, read_note, refined_as, stacked
from engine.runner import Job
from engine.sequence import Sequence as Row
from engine.sequence import Used

MOST_KNOWN = 2_000_000
"""Tokens of texts that are found without their name; about a hundred bytes each."""

_POOL = "pool"
"""Who holds what is hot."""
_READERS = 4
"""Requests whose chunks are fetched at the same time."""
_RECALLED = 16
"""Heads read at a time when an earlier process's chunks are looked through."""
_MOMENT = 0.002
"""Seconds in which the event loop sends a first token: it shares the interpreter, maybe a core, with what follows."""
_CHECKING = 0.01
"""Share of the time that may go into checking the books: it takes longer the more chunks there are. A check that comes
too soon is left out; the next prompt brings another."""

_log = logging.getLogger("hitpath.engine")


@dataclass(slots=True)
class _Counts:
    """Written by the worker."""

    prompts: int = 0
    placed: int = 0
    kept: int = 0
    recomputed: int = 0
    refined: int = 0
    failures: int = 0
    hot: Counter[str] = field(default_factory=Counter)


class Library:
    """See the module. `begin`, and what it hands out, belong to the runner; `close` comes after the runner's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: AttentionBackend,
        point: OperatingPoint,
        *,
        open_store: Callable[[Callable[[Happening], None]], KvStore],
        hot: int,
        known: Callable[[Row], int],
        tell: Callable[[ChunkEvent], None] | None = None,
        patience: float = 5.0,
        seed: int | None = None,
    ) -> None:
        """`backend`: of the executor. `open_store` is given whom it must tell. `hot`: bytes of decoded chunks. `known`:
        leading tokens of a sequence that need not be looked for, asked with the runner's lock held. `seed`: of which
        prompts are checked.
        """
        self.checkpoint, self.point = checkpoint, point
        self._known_prefix, self._emit, self._patience = known, tell, patience
        self._wake: Callable[[], None] = _nobody
        self.gate = Gate(point.most_loss, point.least_agreement)
        self.hot, self.known, self.versions = Hot(hot), Known(MOST_KNOWN), Versions(point.versions)
        refined = [refined_as(slot) for slot in range(point.versions + 1)] if point.indexed else [REFINED]
        self._variants = (*refined, SEEN)
        """What a text is stored as, the best first."""
        self._controller, self._controlled = Controller(apart=checkpoint.device.type != "cpu"), threading.Lock()
        self._random = random.Random(seed)
        self._counts = _Counts()
        self.idle_jobs = IdleJobs(
            checkpoint,
            backend,
            point.stored,
            seen=self._seen,
            others=self.known.others,
            refined=self._take_refined,
            indexed=self._take_indexed,
            compared=self._take_compared,
        )
        self._worse: dict[Key, tuple[Chunk, ...]] = {}
        """By refined version that is being stored: what goes once it is."""
        self._keeping: list[Keeping] = []
        """Of the worker."""
        self._keys: dict[Key, tuple[Text, str, int]] = {}
        """Of what is stored: the text, as what, and in which slot."""
        self._books = threading.Lock()
        self._closed = threading.Event()
        self._checked, self._check_from = True, 0.0
        """Whether nothing has happened since the books were checked; when they may be checked again."""
        self._readers = Workers(_READERS, "kv-fetch", alone)
        self.store = open_store(self._happened)

    def open(self, wake: Callable[[], None]) -> None:
        """Begin. `wake`: see `engine.sequence.Reuse`."""
        self._wake = wake
        self._readers.submit(self._recall)

    # -- the runner's side

    def begin(self, job: Job, row: Row) -> None:
        """See `engine.runner.Library`."""
        if job.exact or job.prompt_logprobs:
            return
        self._checked = False
        # What was computed before reuse was switched off and on again is left to those who saw it.
        row.salt = f"reuse{self.gate.figures().closings}/{row.salt}"
        if row.parent is not None:
            return
        try:
            matches = self._matches(job, row)
            if matches or job.spans:
                row.reuse = self._borrowing(job, row, matches)
        except Exception:  # whatever it is, the prompt can be computed
            _log.exception("chunks could not be looked for")

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens in so many seconds."""
        with self._controlled:
            self._controller.computed(tokens, seconds)

    def told(self, pool: KvPool) -> None:
        """See `engine.runner.Library`."""
        if self._keeping:
            time.sleep(_MOMENT)
        while self._keeping:
            try:
                self._take_in(self._keeping[0], pool)
            except Exception:  # nobody waits for it
                _log.exception("a chunk could not be kept")
            finally:
                del self._keeping[0]

    def idle(self) -> bool:
        """Do a piece of what waits for such a moment; whether there was any. Only on the worker's thread."""
        if self._closed.is_set() or self.idle_jobs.step():
            return not self._closed.is_set()
        if not self._checked and time.monotonic() >= self._check_from:
            self._checked = True
            self._readers.submit(self._check_books)  # which may take a moment, and a request may come
        return False

    def check(self) -> list[str]:
        """What does not add up; empty is good. For when nothing runs."""
        return [*self.store.check(), *self.hot.check(), *self.known.check()]

    def _check_books(self) -> None:
        began = time.thread_time()
        if wrong := self.check():
            self._counts.failures += 1
            _log.error("the chunks' books are wrong: %s", "; ".join(wrong))
        self._check_from = time.monotonic() + (time.thread_time() - began) / _CHECKING

    def close(self) -> None:
        """End what goes on, write what waits to be written."""
        self._closed.set()
        self._readers.shutdown(cancel_futures=True)
        self.store.close()

    def figures(self) -> Figures:
        """See `Figures`."""
        counts = self._counts
        return Figures(
            store=self.store.stats(),
            gate=self.gate.figures(),
            hot_chunks=len(self.hot),
            hot_bytes=self.hot.used,
            hot_hits=counts.hot["hits"],
            hot_read=counts.hot["bytes"],
            prompts=counts.prompts,
            placed=counts.placed,
            kept=counts.kept,
            recomputed=counts.recomputed,
            refined=counts.refined,
            known=len(self.known),
            waiting=len(self._keeping) + len(self.idle_jobs),
            check_failures=counts.failures,
        )

    # -- a prompt's side

    def keep(self, keeping: Keeping) -> None:
        """To be taken out of the pool as soon as nobody waits for that."""
        self._keeping.append(keeping)

    def fetched(self, fetch: Fetch, index: int) -> Held | None:
        """What came whole, from now on hot as well."""
        chunk, noted = fetch.chunk(index), fetch.note(index)
        if chunk is None or noted is None:
            return None
        self._warm(fetch.orders[index].text, held := Held(chunk, noted.refined, noted.slot))
        return held

    def observe(self, job: Job, texts: Sequence[tuple[int, bytes]], spans: Sequence[tuple[int, int]]) -> None:
        """Have these texts of a prompt kept as they are in it, with their context indices, when there is time."""
        wanted = []
        for start, stop in sorted(spans):
            text = self.text(job, job.prompt[start:stop])
            if stop <= LONGEST and not self.versions.familiar(text, names_before(texts, start)):
                wanted.append((text, start, stop))
        if not wanted:
            return
        # Where a text is kept in pieces, each begins one of its own.
        begun = {**{start: text.name for text, start, _ in wanted}, **dict(texts[1:])}
        stop = wanted[-1][2]
        before = (texts[0], *((start, name) for start, name in sorted(begun.items()) if start < stop))
        self.idle_jobs.observe(Observation(tuple(job.prompt[:stop]), job.tenant, before, tuple(wanted)))

    def refine(self, match: Match, job: Job) -> None:
        """Have a text computed again when there is time, unless it was, or is observed."""
        if self.point.indexed:
            return
        held = self.hot.get(match.text)
        if REFINED in self.known.holders(match.text) or (held is not None and held.refined):
            return
        first = min((start for start, _ in job.spans), default=0)
        self.idle_jobs.refine(Refinement(match.text, match.tokens, job.tenant, tuple(job.prompt[:first])))

    def text(self, job: Job, tokens: Sequence[int]) -> Text:
        """How a text of this job's owner is called."""
        return text_of(salt(job.tenant), tokens)

    def count(self, used: Used, hot: Sequence[ChunkKv]) -> None:
        """A prompt was computed with chunks, of which these were hot."""
        counts = self._counts
        counts.prompts += 1
        counts.placed += used.chunks
        counts.kept += used.kept
        counts.recomputed += used.recomputed
        counts.hot["hits"] += len(hot)
        counts.hot["bytes"] += sum(size_of(chunk) for chunk in hot)

    def sampled(self) -> bool:
        """Whether a prompt is to be checked."""
        return self._random.random() < self.point.check_share

    def compare(self, check: Check) -> None:
        """Have it checked when there is time."""
        self.idle_jobs.check(check)

    # -- finding

    def _matches(self, job: Job, row: Row) -> list[Match]:
        """Known texts in the prompt behind what needs not be computed, and marked ones that may be stored."""
        owner, first, least = salt(job.tenant), self._known_prefix(row), max(1, self.point.least // 2)
        found = list(self.known.find(owner, row.prompt, first, least))
        for start, stop in job.spans:
            if start < first or any(match.start < stop and start < match.stop for match in found):
                continue
            tokens = tuple(row.prompt[start:stop])
            if any(True for _ in self._stored(tokens, job.tenant)):
                found.append(Match(text_of(owner, tokens), tokens, start, stop, 0))
        return sorted(found, key=lambda match: match.start)

    def _borrowing(self, job: Job, row: Row, matches: Sequence[Match]) -> Borrowing:
        texts = self._texts(job, matches) if self.point.indexed else ()
        wants: list[Want] = []
        orders: list[Order] = []
        for match in matches:
            prefix = names_before(texts, match.start)
            held = self.hot.get(match.text, prefix)
            if held is not None and self._outdone(match.text, held, prefix):
                held = None
            if held is None:
                versions = tuple(self._stored(match.tokens, job.tenant))
                if not versions:
                    continue
                orders.append(Order(match.text, versions, match.stop - match.start, prefix))
            wants.append(Want(match, held, len(orders) - 1 if held is None else None))
        rest = len(row.prompt) - self._known_prefix(row) - sum(order.count for order in orders)
        fetch = self._fetch(orders, rest) if orders else None
        return Borrowing(self, job, wants, fetch, texts)

    def _outdone(self, text: Text, held: Held, prefix: Sequence[bytes]) -> bool:
        """Whether another version, which is stored, is better than the one that is hot."""
        stored = self.versions.least(text, prefix, held.slot if held.refined else None)
        return stored < unfit(held.chunk.context, prefix)

    def _stored(self, tokens: tuple[int, ...], tenant: str) -> Iterator[Chunk]:
        """What of a text may be stored, the best first."""
        named = (Chunk(tokens, tenant, variant) for variant in self._variants)
        return filter(self.store.may_have, named)

    def _texts(self, job: Job, matches: Sequence[Match]) -> tuple[tuple[int, bytes], ...]:
        """All texts of a prompt by where they begin: what is known, and what its client marked beside that."""
        found = [(match.start, match.text.name) for match in matches]
        for start, stop in job.spans:
            if not any(match.start < stop and start < match.stop for match in matches):
                found.append((start, name_of(job.prompt[start:stop])))
        return in_order(job.prompt, found)

    def _fetch(self, orders: Sequence[Order], rest: int) -> Fetch:
        def plan(wanted: Sequence[Wanted]) -> Plan:
            with self._controlled:
                return self._controller.plan(wanted, rest=max(0, rest), least=self.point.ratio)

        return Fetch(
            self.store,
            orders,
            plan,
            executor=self._readers,
            changed=self._wake,
            device=self.checkpoint.device,
            patience=self._patience,
        )

    # -- keeping

    def _take_in(self, keeping: Keeping, pool: KvPool) -> None:
        job, start = keeping.job, keeping.start
        layers = take(pool, keeping.slots, self.checkpoint.model.rope, start, len(job.prompt))
        chunk = ChunkKv(tuple(job.prompt[start : keeping.stop]), layers, before=start, span=len(job.prompt))
        text = self.text(job, chunk.tokens)
        self._warm(text, Held(chunk, refined=False))
        self._store(Chunk(chunk.tokens, job.tenant, SEEN), chunk, refined=False)
        self.refine(Match(text, chunk.tokens, 0, 0, 0), job)

    def _warm(self, text: Text, held: Held) -> None:
        self.known.add(text, held.chunk.tokens, _POOL)
        for gone in self.hot.put(text, held):
            self.known.remove(gone, _POOL)

    def _store(self, chunk: Chunk, kv: ChunkKv, *, refined: bool, slot: int = 0) -> bool:
        """Whether it was taken; never waits."""
        taken = self.store.prepare_store(chunk, self.point.codec)
        if not isinstance(taken, Slot):
            return False
        note = note_of(kv, refined=refined, slot=slot)
        self.store.complete_store(taken, stacked(kv), importance=kv.sensitivity, note=note)
        return True

    def _happened(self, event: Happening) -> None:
        """What the store tells, on any thread."""
        match event:
            case Transfer():
                source = Source(event.tier, event.codec, event.size, event.plain)
                with self._controlled:
                    self._controller.transferred(source, event.reading, event.decoding)
            case Kept():
                self._now_kept(event)
            case Gone():
                self._now_gone(event.key)

    def _now_kept(self, event: Kept) -> None:
        noted = read_note(event.note, len(event.tokens))
        text, holder = text_of(event.key[0], event.tokens), refined_as(noted.slot) if noted.refined else SEEN
        with self._books:
            self._keys[event.key] = (text, holder, noted.slot)
            worse = self._worse.pop(event.key, ())
        if self.point.indexed and noted.refined:
            self.versions.add(text, noted.slot, noted.context)
        first = not self.known.holders(text) - {_POOL}
        self.known.add(text, event.tokens, holder)
        if first and self._emit is not None:
            self._emit(ChunkStored(_told(text), event.tokens))
        for chunk in worse:
            self.store.discard(chunk)

    def _now_gone(self, key: Key) -> None:
        with self._books:
            entry = self._keys.pop(key, None)
            self._worse.pop(key, None)
        if entry is None:
            return
        text, holder, slot = entry
        self.known.remove(text, holder)
        if holder != SEEN:
            self.versions.remove(text, slot)
        if not self.known.holders(text) - {_POOL} and self._emit is not None:
            self._emit(ChunkRemoved(_told(text)))

    def _recall(self) -> None:
        """Get to know what an earlier process left, beside everything else."""
        try:
            while not self._closed.is_set() and self.store.recall(_RECALLED):
                time.sleep(0)
        except Exception:  # what is not recalled is still found by name
            _log.exception("stored chunks could not be looked through")

    # -- for background jobs

    def _seen(self, text: Text) -> ChunkKv | None:
        held = self.hot.get(text)
        return None if held is None else held.chunk

    def _take_refined(self, job: Refinement, chunk: ChunkKv) -> None:
        self._put_refined(job.text, job.tenant, chunk, 0, ())

    def _take_indexed(self, text: Text, tenant: str, chunk: ChunkKv) -> None:
        if (room := self.versions.room(text)) is not None:
            slot, goes = room
            self._put_refined(text, tenant, chunk, slot, () if goes is None else (refined_as(goes),))

    def _put_refined(self, text: Text, tenant: str, chunk: ChunkKv, slot: int, worse: Sequence[str]) -> None:
        """Keep it in this slot, unless one is being stored there; once it is, those variants and what was seen go."""
        version = Chunk(chunk.tokens, tenant, refined_as(slot))
        key = (salt(tenant), version.name(self.store.geometry))
        with self._books:
            if key in self._worse:
                return
            self._worse[key] = tuple(Chunk(chunk.tokens, tenant, variant) for variant in (SEEN, *worse))
        self._counts.refined += 1
        self._warm(text, Held(chunk, refined=True, slot=slot))
        if not self._store(version, chunk, refined=True, slot=slot):
            with self._books:
                self._worse.pop(key, None)

    def _take_compared(self, compared: Compared) -> None:
        if not self.gate.observe(compared.kl, compared.agrees):
            return
        figures = self.gate.figures()
        if figures.open:
            _log.warning("chunks are reused again: checks find no more loss than the operating point allows")
        else:
            _log.warning(
                "chunks are reused no more: checks find more loss than the operating point allows (%s nats); "
                "calibrate the model anew",
                self.point.most_loss,
            )


def _told(text: Text) -> bytes:
    """A text's name for those who are not to know which owners have the same one."""
    return blake2b(text.owner.encode() + text.digest, digest_size=16).digest()


def _nobody() -> None:
    """Nobody waits yet."""
