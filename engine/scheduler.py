"""What is computed in the next step, for whom. Plain code over plain state; no tensors, no clock, no threads.

Life of a sequence: `add` → waiting → (admitted) running → `finish` or `cancel`; a running one may be sent back to
waiting for want of blocks (preempted) and later computes again what was lost, its drawn tokens included.

Guaranteed
- Every running sequence that has only its newest token to compute gets it computed in every step, whatever else there
  is, unless it is preempted in that step.
- Preempted is always the running sequence that arrived last. The one that arrived first never is, so something always
  ends, and with it in the end everything.
- A preempted sequence is admitted before any that has not run yet.
- A sequence that has waited for `patience` seconds is overtaken no more: only preempted ones, and those that arrived
  before it and are overdue as well, are admitted before it. So it is admitted at the latest when all that run by then
  have ended. (Not counted is a child while it waits for the prompt of its parent.)
- What several wait for is computed once: a sequence lets a running one compute the prefix they share, unless overdue.
- Until then the tenant that has been served least is next, measured in tokens computed for it; within a tenant the
  order is that of predicted cost plus time of arrival.
- A sequence whose chunks are still on their way is passed over while others can run, unless overdue or preempted.
- What is computed counts: prompt tokens that chunks bring cost neither budget nor service.
- Kept tokens are repaired with what is left of the budget, so they delay nobody.
- A step computes no more tokens than its budget, but for the end of a prompt: what would be left of it for a step of
  its own and is a quarter of a budget at most is computed as well, since a small step takes hardly less than others.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from engine.blocks import BlockManager, Inconsistent
from engine.errors import ContextTooLong, QueueFull, RequestError
from engine.sequence import Dropped, Positions, Reuse, Sequence, State, by_worth

AGEING_STEPS = 16
"""Waiting for `patience` weighs as much as the cost of so many full steps."""
_STRETCH = 4
"""The end of a prompt may go beyond the budget by so small a part of it."""
FRESH_COSTS = 4
"""Of each tenant, the first so many have their predicted cost looked up anew when known blocks have changed, …"""
LOOKUPS = 16
"""… but no more than so many look-ups are made in a step, …"""
FAILURES = 16
"""… and no more than so many that turn out not to fit are tried."""
SPARE = 0.01
"""Share of the pool that stays available after an admission, so that it does not at once lead to a preemption."""


@dataclass(eq=False, slots=True)  # not frozen: one is built for every token, and freezing would treble what that costs
class Chunk:
    """Tokens `start` to `start + count` of a sequence, which this step brings into the pool. Not to be changed."""

    sequence: Sequence
    start: int
    count: int
    draws: bool
    """They are its last ones so far: the next is drawn from their scores."""
    rows: Positions | None = None
    """Those computed, where it is not all of them: without those kept, or earlier ones to be repaired before the last.
    The last token of a piece that draws is always among them."""

    @property
    def size(self) -> int:
        """Tokens that are computed; one at least."""
        return self.count if self.rows is None else len(self.rows)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model: first the copies, in order, then all chunks at once."""

    chunks: tuple[Chunk, ...]
    """First those of one token that draw, then the pieces of prompts."""
    copies: tuple[tuple[int, int], ...]
    """Blocks to copy, (from, to), one after the other, before anything is written."""
    preempted: tuple[Sequence, ...]
    """Lost their blocks in favour of others. They come again, from their first token on or from known blocks; where
    there is room after all, in this very step."""


@dataclass(eq=False, slots=True)
class _Waiting:
    """A sequence in its tenant's queue, and what was last known of its cost."""

    sequence: Sequence
    hit: int = 0
    score: float = 0.0
    generation: int = -1


@dataclass(eq=False, slots=True)
class _Tenant:
    """One who has work here; forgotten when the last of it ends."""

    service: int
    """Tokens computed for it, beginning with as many as others had when it came."""
    queue: list[_Waiting] = field(default_factory=list)
    """By score, the next one first. Preempted ones are not in it."""
    sequences: int = 0
    """Waiting, preempted and running ones."""


@dataclass(slots=True)
class _Plan:
    """A step in the making."""

    budget: int
    decodes: list[Chunk] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


_by_order = attrgetter("order")
_by_score = attrgetter("score")


class Scheduler:
    """Queues and running sequences over one pool of blocks. One thread owns it; `schedule` and `complete` alternate."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_waiting: int,
        token_budget: int,
        patience: float,
        repairs: int = 0,
    ) -> None:
        """`token_budget`: tokens computed in one step. `patience`: seconds.

        `repairs`: tokens kept of a prompt that are computed at most beside each token drawn. Raises ValueError.
        """
        if not 1 <= max_running <= token_budget:
            raise ValueError(f"max_running is {max_running}: it must be from 1 to token_budget, {token_budget}")
        if patience <= 0:
            raise ValueError(f"patience is {patience} s: it must be more than 0")
        self._blocks, self._patience, self._repairs = blocks, patience, repairs
        self._max_running, self._max_waiting, self._token_budget = max_running, max_waiting, token_budget
        self._ageing = AGEING_STEPS * token_budget / patience
        self._spare = max(1, round(SPARE * blocks.total))
        self._running: list[Sequence] = []
        """By order of arrival."""
        self._preempted: list[Sequence] = []
        """By order of arrival."""
        self._waiting: dict[Sequence, _Waiting] = {}
        """By order of arrival. Without the preempted ones."""
        self._tenants: dict[str, _Tenant] = {}
        self._level = 0
        """Service of the tenant whose queue was the last to become empty."""
        self._arrivals = 0
        self._lookups = 0
        self.preemptions = 0
        """How often a sequence had to give its blocks back."""
        self.repaired = 0
        """Kept tokens that were computed beside those drawn."""

    def depth(self) -> tuple[int, int]:
        """How many sequences run, and how many wait (preempted ones too)."""
        return len(self._running), len(self._waiting) + len(self._preempted)

    def add(self, sequences: Row[Sequence], now: float) -> None:
        """Queue all of them or none. A parent stands before its children, or was added earlier.

        Raises QueueFull; ContextTooLong for one that the whole pool could not hold; RequestError for an empty prompt;
        ValueError for a child that does not fit its parent.
        """
        waiting = len(self._waiting) + len(self._preempted)
        # While nobody waits any request is taken whole; a bound below its own size would refuse it for ever.
        if waiting and waiting + len(sequences) > self._max_waiting:
            raise QueueFull(self._max_waiting)
        together: set[Sequence] = set()
        for sequence in sequences:
            self._validate(sequence, together)
            together.add(sequence)
        for sequence in sequences:
            self._enqueue(sequence, now)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """End them now, wherever they are; those that have ended, or were never added, are left alone."""
        for sequence in sequences:
            if self._knows(sequence):
                self._end(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Its answer is complete. To be called after `complete`, so that what the step computed can be kept."""
        self.cancel((sequence,))

    def schedule(self, now: float) -> Step | None:
        """The next step, or None if there is nothing to do. `now` never goes back."""
        plan = _Plan(self._token_budget)
        self._decode(plan)
        self._prefill(plan)
        if (self._waiting or self._preempted) and self._has_room(plan):
            self._lookups = LOOKUPS
            if self._admit_first(plan, now):
                self._admit_by_service(plan)
                if not plan.decodes and not plan.prefills:
                    self._admit_by_service(plan, idle=True)
        if self._repairs:
            self._repair(plan)
        if not plan.decodes and not plan.prefills:
            return None
        return Step((*plan.decodes, *plan.prefills), tuple(self._blocks.take_copies()), tuple(plan.preempted))

    def settle(self, lost: Iterable[Sequence], dropped: Mapping[Sequence, Dropped]) -> None:
        """What the computing of a step found out about chunks. To be called before `complete`.

        `lost`: what was to be placed did not come; they are computed from `computed` on, so their chunks must not be
        completed. `dropped`: tokens not computed in the end, which are kept as those that never were to be.
        """
        for sequence in lost:
            sequence.strip()
        for sequence, its in dropped.items():
            kept = sequence.kept
            sequence.kept = its.positions if kept is None else np.union1d(kept, its.positions)
            if its.missed is not None:
                if sequence.missed is None:
                    sequence.missed = np.full(len(sequence.prompt), -np.inf, dtype=np.float32)
                sequence.missed[its.positions] = its.missed

    def complete(self, step: Step, drawn: Mapping[Sequence, int]) -> None:
        """The step was computed; `drawn` has the next token of every chunk that draws.

        Sequences that ended in between are passed over. Raises KeyError where a token is missing.
        """
        size = self._blocks.size
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.state is not State.RUNNING:
                continue
            sequence.computed = computed = chunk.start + chunk.count
            if computed // size > sequence.committed:
                self._blocks.commit(sequence)
            if chunk.draws:
                sequence.tokens.append(drawn[sequence])

    def check(self) -> None:
        """Hold lists, tenants and blocks against each other. Raises Inconsistent."""
        self._blocks.check()
        if len(self._running) > self._max_running:
            raise Inconsistent(f"{len(self._running)} sequences run; {self._max_running} may")
        for name, row, state in (
            ("running", self._running, State.RUNNING),
            ("preempted", self._preempted, State.WAITING),
            ("waiting", list(self._waiting), State.WAITING),
        ):
            orders = [sequence.order for sequence in row]
            if orders != sorted(set(orders)):
                raise Inconsistent(f"the {name} sequences are not in order: {orders}")
            for sequence in row:
                if sequence.state is not state or bool(sequence.table) != (state is State.RUNNING):
                    raise Inconsistent(f"a {name} sequence is {sequence.state} with {len(sequence.table)} blocks")
        if not self._running and self._blocks.used():
            raise Inconsistent(f"nothing runs, yet {self._blocks.used()} blocks are in use")
        self._check_tenants()

    def _check_tenants(self) -> None:
        counts = dict.fromkeys(self._tenants, 0)
        for sequence in (*self._running, *self._preempted, *self._waiting):
            if sequence.tenant not in counts:
                raise Inconsistent(f"the tenant {sequence.tenant!r} was forgotten")
            counts[sequence.tenant] += 1
        for name, tenant in self._tenants.items():
            if tenant.sequences != counts[name] or not counts[name]:
                raise Inconsistent(f"the tenant {name!r} has {counts[name]} sequences, not {tenant.sequences}")
            scores = [entry.score for entry in tenant.queue]
            if scores != sorted(scores):
                raise Inconsistent(f"the queue of {name!r} is not in order: {scores}")
        queued = {entry for tenant in self._tenants.values() for entry in tenant.queue}
        if queued != set(self._waiting.values()):
            raise Inconsistent("the tenants' queues do not hold the waiting sequences")

    # Coming and going

    def _validate(self, sequence: Sequence, together: set[Sequence]) -> None:
        if not sequence.prompt:
            raise RequestError("The prompt is empty.", param="prompt")
        # The last token of an answer is drawn and never computed.
        tokens = len(sequence.prompt) + max(1, sequence.params.max_tokens) - 1
        if self._blocks.covering(tokens) > self._blocks.total:
            room = self._blocks.total * self._blocks.size
            raise ContextTooLong(
                f"Prompt and answer need {tokens} tokens of KV memory; there is room for {room}.",
                param="prompt" if len(sequence.prompt) > room else "max_tokens",
            )
        if sequence in together or self._knows(sequence) or sequence.state is not State.WAITING:
            raise ValueError("a sequence is added once")
        if sequence.reuse is not None and (sequence.fresh or not sequence.salt):
            raise ValueError(
                "what chunks bring is not exact: it goes with a salt, and not with a prompt that is scored"
            )
        if (parent := sequence.parent) is None:
            return
        if parent not in together and not self._knows(parent) and parent.state is not State.FINISHED:
            raise ValueError("a child is added with its parent or after it")
        if (parent.prompt, parent.tenant, parent.salt) != (sequence.prompt, sequence.tenant, sequence.salt):
            raise ValueError("a child has its parent's prompt, tenant and salt")

    def _knows(self, sequence: Sequence) -> bool:
        return sequence in self._waiting or sequence.state is State.RUNNING or sequence in self._preempted

    def _enqueue(self, sequence: Sequence, now: float) -> None:
        sequence.arrived, sequence.order = now, self._arrivals
        self._arrivals += 1
        tenant = self._tenants.setdefault(sequence.tenant, _Tenant(0))
        if not tenant.queue:
            # Who had nothing waiting has saved nothing up: "Fairness in Serving Large Language Models" (Sheng et al.,
            # 2024), section 4.1, lifts the counter of a client that comes back in the same way.
            others = (other.service for other in self._tenants.values() if other.queue)
            tenant.service = max(tenant.service, min(others, default=self._level))
        tenant.sequences += 1
        entry = self._waiting[sequence] = _Waiting(sequence)
        self._predict(entry)
        insort(tenant.queue, entry, key=_by_score)

    def _end(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._blocks.release(sequence)
        elif sequence in self._waiting:
            self._dequeue(sequence)
        else:
            self._preempted.remove(sequence)
        sequence.state = State.FINISHED
        _release(sequence)
        tenant = self._tenants[sequence.tenant]
        tenant.sequences -= 1
        if not tenant.sequences:
            del self._tenants[sequence.tenant]

    def _dequeue(self, sequence: Sequence) -> None:
        tenant = self._tenants[sequence.tenant]
        tenant.queue.remove(self._waiting.pop(sequence))
        if not tenant.queue:
            self._level = tenant.service

    def _preempt(self, plan: _Plan) -> Sequence:
        """Send the one that arrived last back to waiting."""
        sequence = self._running.pop()
        self._blocks.release(sequence)
        sequence.state = State.WAITING
        _release(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self._preempted, sequence, key=_by_order)
        plan.preempted.append(sequence)
        return sequence

    # Running ones

    def _decode(self, plan: _Plan) -> None:
        """The newest token of each, the first arrived first: whoever is preempted has nothing planned yet."""
        reserve, tenants, decodes = self._blocks.reserve, self._tenants, plan.decodes
        for sequence in tuple(self._running):
            computed, length = sequence.computed, len(sequence.tokens)
            if length - computed != 1 or sequence.state is not State.RUNNING:
                continue
            while not (reserved := reserve(sequence, length)):
                if self._preempt(plan) is sequence:
                    break
            if reserved:
                decodes.append(Chunk(sequence, computed, 1, True))
                tenants[sequence.tenant].service += 1
        plan.budget -= len(decodes)

    def _prefill(self, plan: _Plan) -> None:
        """More of the prompts begun, the first arrived first. Their blocks were reserved on admission."""
        for sequence in self._running:
            if plan.budget <= 0:
                return
            if len(sequence.tokens) - sequence.computed > 1:
                self._plan_prefill(plan, sequence)

    def _plan_prefill(self, plan: _Plan, sequence: Sequence) -> None:
        chunk = _piece(sequence, plan.budget, self._token_budget // _STRETCH)
        size = chunk.size
        (plan.decodes if chunk.draws and size == 1 else plan.prefills).append(chunk)
        plan.budget -= size
        self._tenants[sequence.tenant].service += size

    def _repair(self, plan: _Plan) -> None:
        """With what is left of the budget, compute some of the kept tokens beside those drawn.

        Those that are missed most first, where the selector said so. Else the first ones first: what they see is
        repaired already, as far as it will be.
        """
        for chunk in plan.decodes:
            sequence = chunk.sequence
            if sequence.kept is None or chunk.start < len(sequence.prompt):
                continue
            left = sequence.repairs
            if left is None:
                left, sequence.missed = by_worth(sequence.kept, sequence.missed), None
            count = max(0, min(self._repairs, plan.budget))
            sequence.repairs = left[count:]
            rows = sorted(int(at) for at in left[:count] if self._blocks.alone(sequence, int(at)))
            if rows:
                chunk.rows = np.array([*rows, chunk.start], dtype=np.int64)
                plan.budget -= len(rows)
                self.repaired += len(rows)
                self._tenants[sequence.tenant].service += len(rows)

    # Admission

    def _has_room(self, plan: _Plan) -> bool:
        return plan.budget > 0 and len(self._running) < self._max_running

    def _admit_first(self, plan: _Plan, now: float) -> bool:
        """Those that nothing may overtake; False if one of them has to wait still."""
        while (sequence := self._unpassable(now)) is not None:
            if not self._has_room(plan) or not self._admit(plan, sequence):
                return False
        return True

    def _unpassable(self, now: float) -> Sequence | None:
        if self._preempted:
            return self._preempted[0]
        for sequence in self._waiting:
            if now - sequence.arrived < self._patience:
                return None
            if not _held(sequence):
                return sequence
        return None

    def _admit_by_service(self, plan: _Plan, *, idle: bool = False) -> None:
        """All others: again and again the next fitting one of the tenant that was served least.

        `idle`: nobody can run, so one of those whose chunks are on their way may, and meet them.
        """
        heap = [
            (tenant.service, place, tenant, self._candidates(tenant, idle))
            for place, tenant in enumerate(self._tenants.values())
            if tenant.queue
        ]
        heapq.heapify(heap)
        failures = 0
        while heap and failures < FAILURES and self._has_room(plan):
            _, place, tenant, candidates = heap[0]
            sequence = next(candidates, None)
            if sequence is None:
                heapq.heappop(heap)
            elif self._admit(plan, sequence):
                if idle:
                    return
                heapq.heapreplace(heap, (tenant.service, place, tenant, candidates))
            else:
                failures += 1

    def _candidates(self, tenant: _Tenant, idle: bool) -> Iterator[Sequence]:
        """Its waiting sequences that seem to fit, best first."""
        self._refresh(tenant)
        for entry in tuple(tenant.queue):
            sequence = entry.sequence
            forks = _forks(sequence)
            if sequence.reuse is not None and not forks and sequence.reuse.held(idle):
                continue
            if not _held(sequence) and (forks or self._is_ready(entry)):
                yield sequence

    def _is_ready(self, entry: _Waiting) -> bool:
        """It seems to fit, and what it needs next is not being computed already: then it waits for that.

        Goes by what was last known of its hits, which keeps look-ups away from the many that do not fit.
        """
        wanted = self._blocks.covering(len(entry.sequence.tokens) - entry.hit)
        if wanted > self._blocks.available() - (self._spare if self._running else 0):
            return False
        return not self._blocks.coming(entry.sequence, entry.hit)

    def _refresh(self, tenant: _Tenant) -> None:
        for entry in tenant.queue[:FRESH_COSTS]:
            if entry.generation != self._blocks.generation and self._lookups > 0:
                self._lookups -= 1
                self._predict(entry)
        tenant.queue.sort(key=_by_score)

    def _predict(self, entry: _Waiting) -> None:
        """Tokens left to compute for the prompt, and the answer's, as far as that can be said, plus age.

        The limit of an answer says little about its length (many clients set none): beyond one step's worth it does
        not count. Waiting lowers the score of all alike, so the order changes only with the costs.
        """
        sequence = entry.sequence
        shares = _held(sequence) or _forks(sequence)
        entry.generation = self._blocks.generation
        entry.hit = len(sequence.tokens) - 1 if shares else self._blocks.lookup(sequence)
        brought = 0 if sequence.reuse is None else sequence.reuse.likely(entry.hit)
        cost = len(sequence.tokens) - entry.hit - brought + min(sequence.params.max_tokens, self._token_budget)
        entry.score = cost + self._ageing * sequence.arrived

    def _admit(self, plan: _Plan, sequence: Sequence) -> bool:
        """Let it run and plan its first piece; False if there are not enough blocks."""
        spare = self._spare if self._running else 0
        parent = sequence.parent
        if parent is not None and _forks(sequence):
            fits = self._blocks.fork(parent, sequence, spare=spare)
        else:
            fits = self._blocks.admit(sequence, spare=spare)
        if not fits:
            return False
        if sequence in self._waiting:
            self._dequeue(sequence)
        else:
            self._preempted.remove(sequence)
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_by_order)
        if sequence.reuse is not None:
            _blend(sequence, sequence.reuse)
        self._plan_prefill(plan, sequence)
        return True


def _piece(sequence: Sequence, budget: int, stretch: int) -> Chunk:
    """Its next tokens: as many as are computed with `budget`, or `stretch` more where they are the last."""
    start, end, kept = sequence.computed, len(sequence.tokens), sequence.kept
    if kept is None or not len(kept) or kept[-1] < start:
        count = end - start if end - start <= budget + stretch else budget
        return Chunk(sequence, start, count, count == end - start)
    missing = np.ones(end - start, dtype=np.bool_)
    missing[kept[np.searchsorted(kept, start) :] - start] = False
    rows = np.flatnonzero(missing) + start
    if len(rows) <= budget + stretch:
        budget = len(rows)
    # Up to the next token that has to be computed: those kept before it come for nothing.
    stop = end if len(rows) <= budget else int(rows[budget])
    rows = rows[:budget]
    return Chunk(sequence, start, stop - start, stop == end, None if len(rows) == stop - start else rows)


def _blend(sequence: Sequence, reuse: Reuse) -> None:
    """Take what its chunks bring, as far as it has to be computed."""
    last = len(sequence.prompt) - 1
    if sequence.computed >= last:
        return
    sequence.blended = reuse.admitted(sequence)
    if sequence.blended is not None:
        kept = sequence.blended.kept()
        sequence.kept = kept[np.searchsorted(kept, sequence.computed) : np.searchsorted(kept, last)]


def _release(sequence: Sequence) -> None:
    if sequence.reuse is not None:
        sequence.reuse.released(sequence)
        sequence.strip()


def _held(sequence: Sequence) -> bool:
    """It waits for its parent's prompt to be computed; again, where the parent was preempted: it comes back first."""
    parent = sequence.parent
    if parent is None or sequence.fresh:
        return False
    return parent.state is not State.FINISHED and parent.computed < len(parent.prompt)


def _forks(sequence: Sequence) -> bool:
    """Its parent's prompt is computed and still there."""
    parent = sequence.parent
    if parent is None or sequence.fresh or sequence.preemptions:
        return False
    return parent.state is State.RUNNING and parent.computed >= len(parent.prompt)
