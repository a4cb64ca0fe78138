"""Who is computed when: a scheduler over a pool without tensors, step by step."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from engine.attention import KvPool
from engine.blocks import BlockManager
from engine.errors import ContextTooLong, QueueFull, RequestError
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler, Step
from engine.sequence import NO_CHUNKS, Sequence, State, Used
from tests.engine.shadow import Engine, sequence

_numbers = itertools.count(1000)


def unlike(length: int) -> list[int]:
    """A prompt that shares nothing with any other."""
    return [next(_numbers) for _ in range(length)]


def test_one_answer() -> None:
    engine = Engine(token_budget=8)
    one = sequence(range(20), max_tokens=3)
    engine.add(one)
    steps = [[(chunk.start, chunk.count, chunk.draws) for chunk in step.chunks] for step in iter(engine.step, None)]
    assert steps == [[(0, 8, False)], [(8, 8, False)], [(16, 4, True)], [(20, 1, True)], [(21, 1, True)]]
    assert (one.state, one.drawn) == (State.FINISHED, 3)
    assert engine.scheduler.depth() == (0, 0)
    assert engine.blocks.used() == 0


def test_a_later_request_finds_the_prefix() -> None:
    engine = Engine()
    engine.add(sequence(range(20)))
    engine.run()
    two = sequence([*range(16), 70, 71])
    engine.add(two)
    step = engine.step()
    assert step is not None
    assert [(chunk.start, chunk.count) for chunk in step.chunks] == [(16, 2)]
    assert two.cached == 16


def test_an_answer_can_be_continued() -> None:
    engine = Engine()
    one = sequence(range(10), max_tokens=8)
    engine.add(one)
    engine.run()
    again = sequence([*one.tokens, 1, 2, 3])
    engine.add(again)
    engine.run()
    assert again.cached == 16


@pytest.mark.parametrize(("tokens", "steps"), [(8, [8]), (10, [10]), (11, [8, 3]), (18, [8, 10]), (19, [8, 8, 3])])
def test_a_prompt_ends_a_little_beyond_the_budget(tokens: int, steps: list[int]) -> None:
    engine = Engine(total=400, token_budget=8)
    engine.add(sequence(unlike(tokens), max_tokens=1))
    computed = []
    while (step := engine.step()) is not None:
        computed.append(sum(chunk.count for chunk in step.chunks))
    assert computed == steps


def test_decodes_come_in_every_step_and_first() -> None:
    engine = Engine(total=400, token_budget=8)
    decoding = [sequence(unlike(2), max_tokens=60) for _ in range(4)]
    engine.add(*decoding)
    engine.step()
    for _ in range(3):
        engine.add(sequence(unlike(60), max_tokens=2))
    for _ in range(50):
        step = engine.step()
        assert step is not None
        assert [chunk.sequence for chunk in step.chunks[:4]] == decoding
        assert all(chunk.count == 1 and chunk.draws for chunk in step.chunks[:4])
        assert sum(chunk.count for chunk in step.chunks) <= 10
    engine.run()


def test_prefill_goes_on_beside_decodes() -> None:
    engine = Engine(total=400, max_running=8, token_budget=8)
    engine.add(*[sequence(unlike(1), max_tokens=100) for _ in range(7)])
    engine.step()
    late = sequence(unlike(20), max_tokens=2)
    engine.add(late)
    for _ in range(22):
        engine.step()
    assert late.state is State.FINISHED


def test_the_cheaper_goes_first_and_what_is_known_is_cheap() -> None:
    engine = Engine(total=200, max_running=1)
    engine.add(sequence(range(40), max_tokens=1))
    engine.run()
    known, large, small = sequence([*range(40), 9]), sequence(unlike(30)), sequence(unlike(10))
    engine.add(large, small, known)
    engine.run()
    assert engine.admitted[1:] == [known, small, large]


def test_what_several_wait_for_is_computed_once() -> None:
    engine = Engine(total=200, token_budget=64, max_running=8)
    shared = unlike(40)
    rows = [sequence([*shared, *unlike(3)], max_tokens=1) for _ in range(6)]
    other = sequence(unlike(5), max_tokens=1)
    engine.add(*rows, other)
    first = engine.step()
    assert first is not None
    assert {chunk.sequence for chunk in first.chunks} == {rows[0], other}
    second = engine.step()
    assert second is not None
    assert [(chunk.start, chunk.count) for chunk in second.chunks] == [(40, 3)] * 5


def test_the_overdue_compute_for_themselves() -> None:
    engine = Engine(total=200, token_budget=30, patience=1.0)
    rows = [sequence(range(40)) for _ in range(2)]
    engine.add(rows[0])
    engine.step()
    engine.add(rows[1])
    engine.now += 5
    engine.step()
    assert rows[1].state is State.RUNNING
    engine.run()


@pytest.mark.parametrize("end", ["cancel", "clear"])
def test_nobody_waits_for_what_will_not_come(end: str) -> None:
    engine = Engine(total=200, token_budget=10)
    rows = [sequence(range(40)) for _ in range(2)]
    engine.add(*rows)
    engine.step()
    engine.step()
    assert engine.scheduler.depth() == (1, 1)
    if end == "cancel":
        engine.scheduler.cancel(rows[:1])
    else:
        engine.blocks.clear()
        for _ in range(3):
            engine.step()
    engine.step()
    assert rows[1] in engine.admitted
    engine.run()


def test_age_counts() -> None:
    engine = Engine(total=200, max_running=1, token_budget=16, patience=100.0)  # a second weighs 2.56 tokens
    engine.add(sequence(unlike(4), max_tokens=30))
    engine.step()
    large = sequence(unlike(40))
    engine.add(large)
    for _ in range(20):
        engine.step()
    small = sequence(unlike(10))
    engine.add(small)
    engine.run()
    assert engine.admitted[1:] == [large, small]


def test_what_does_not_fit_blocks_nobody() -> None:
    engine = Engine(total=10, max_running=4)
    engine.add(sequence(unlike(20), max_tokens=8))
    engine.step()
    large, small = sequence(unlike(30)), sequence(unlike(6))
    engine.add(large)
    engine.step()
    engine.add(small)
    engine.step()
    engine.step()
    assert (large.state, small.state) == (State.WAITING, State.RUNNING)
    engine.run()


def test_patience_is_a_bound() -> None:
    """A stream of small ones would keep a large one out for ever."""
    engine = Engine(total=10, size=4, max_running=4, patience=20.0)
    large = sequence(unlike(36), max_tokens=2)
    later: list[Sequence] = []
    for step in range(60):
        if step == 3:
            engine.add(large)
        small = sequence(unlike(8), max_tokens=4)
        later.append(small)
        engine.add(small)
        engine.step()
    assert large.state is State.FINISHED
    overdue_at = large.arrived + 20.0
    overtook = [s for s in engine.admitted[: engine.admitted.index(large)] if s.arrived > large.arrived]
    assert overtook, "small ones go first until then"
    assert all(s.arrived < overdue_at for s in overtook)
    engine.scheduler.cancel(later)
    engine.run()


def test_the_overdue_go_in_order_of_arrival() -> None:
    engine = Engine(max_running=1, patience=2.0)
    rows = []
    for length in (30, 20, 10, 25):
        rows.append(sequence(unlike(length), tenant=str(length % 3)))
        engine.add(rows[-1])
        engine.now += 0.25
    engine.now += 10
    engine.run()
    assert engine.admitted == rows


def served(engine: Engine, steps: int) -> dict[str, int]:
    """Tokens computed per tenant."""
    shares: dict[str, int] = {}
    for _ in range(steps):
        step = engine.step()
        assert step is not None
        for chunk in step.chunks:
            shares[chunk.sequence.tenant] = shares.get(chunk.sequence.tenant, 0) + chunk.count
    return shares


def test_tenants_get_equal_shares() -> None:
    engine = Engine(total=200, max_running=4, max_waiting=1000, patience=1e9)
    engine.add(*[sequence(unlike(30), 10, tenant="greedy") for _ in range(90)])
    engine.add(*[sequence(unlike(9), 3, tenant="modest") for _ in range(290)])
    shares = served(engine, 200)
    assert shares["modest"] == pytest.approx(shares["greedy"], rel=0.1)


def test_a_new_tenant_is_next_but_has_saved_nothing_up() -> None:
    engine = Engine(total=200, max_running=2, max_waiting=1000, patience=1e9)
    engine.add(*[sequence(unlike(20), 5, tenant="old") for _ in range(200)])
    served(engine, 100)
    engine.add(*[sequence(unlike(20), 5, tenant="new") for _ in range(200)])
    shares = served(engine, 200)
    assert shares["new"] == pytest.approx(shares["old"], rel=0.1)


def test_who_asked_for_little_has_saved_nothing_up() -> None:
    """One small request all along: never forgotten, and never in want of its share."""
    engine = Engine(total=400, max_running=3, max_waiting=1000, patience=1e9)
    engine.add(sequence(unlike(4), 1000, tenant="quiet"))
    engine.step()
    engine.add(*[sequence(unlike(20), 5, tenant="busy") for _ in range(400)])
    served(engine, 200)
    engine.add(*[sequence(unlike(20), 5, tenant="quiet") for _ in range(200)])
    shares = served(engine, 150)
    assert shares["quiet"] == pytest.approx(shares["busy"], rel=0.15)


def test_preemption_takes_the_newest_and_keeps_its_tokens() -> None:
    engine = Engine(total=9, size=2, max_running=3)
    rows = [sequence(unlike(3), max_tokens=8) for _ in range(3)]
    engine.add(*rows)
    preempted: list[tuple[Sequence, list[int]]] = []
    for step in iter(engine.step, None):
        preempted += [(one, list(one.tokens)) for one in step.preempted]
    assert preempted[0][0] is rows[2]
    assert engine.scheduler.preemptions == len(preempted) == sum(one.preemptions for one in rows)
    assert rows[0].preemptions == 0
    for one, tokens in preempted:
        assert len(tokens) > 3
        assert one.tokens[: len(tokens)] == tokens
    assert [one.drawn for one in rows] == [8, 8, 8]


def test_the_preempted_come_back_before_others() -> None:
    engine = Engine(total=8, size=2, max_running=2)
    rows = [sequence(unlike(5), max_tokens=8) for _ in range(2)]
    engine.add(*rows)
    while not engine.scheduler.preemptions:
        engine.step()
    small = sequence(unlike(1), max_tokens=1)
    engine.add(small)
    while small.state is State.WAITING:
        engine.step()
    assert rows[1].state is not State.WAITING
    engine.run()


def test_an_answer_as_large_as_the_pool() -> None:
    engine = Engine(total=4, size=4)
    one = sequence(range(10), max_tokens=7)
    engine.add(one)
    engine.run()
    again = sequence(one.tokens[:16], max_tokens=1)
    engine.add(again)
    engine.run()
    assert again.cached == 15
    for prompt, answer, param in ((10, 8, "max_tokens"), (17, 1, "prompt")):
        with pytest.raises(ContextTooLong, match="17 tokens") as caught:
            engine.add(sequence(range(prompt), max_tokens=answer))
        assert caught.value.param == param


def test_answers_to_one_prompt_compute_it_once() -> None:
    engine = Engine(token_budget=8)
    parent = sequence(range(14))
    children = [sequence(range(14), parent=parent) for _ in range(3)]
    engine.add(parent, *children)
    chunks = [chunk for step in iter(engine.step, None) for chunk in step.chunks]
    for child in children:
        assert next((c.start, c.count) for c in chunks if c.sequence is child) == (13, 1)
        assert child.drawn == 4
    assert sum(chunk.count for chunk in chunks) == 14 + 3 + 4 * 3


def test_children_are_decodes_to_the_runner() -> None:
    engine = Engine()
    parent = sequence(range(6))
    engine.add(parent, sequence(range(6), parent=parent))
    engine.step()
    engine.add(sequence(unlike(9)))
    step = engine.step()
    assert step is not None
    assert [chunk.count for chunk in step.chunks] == [1, 1, 9]


@pytest.mark.parametrize("when", [0, 1, 2])
def test_children_survive_their_parent(when: int) -> None:
    engine = Engine(token_budget=8)
    parent = sequence(range(14))
    child = sequence(range(14), parent=parent)
    engine.add(parent, child)
    for _ in range(when):
        engine.step()
    engine.scheduler.cancel([parent])
    engine.run()
    assert (parent.state, child.drawn) == (State.FINISHED, 4)


def test_children_of_a_preempted_parent_get_their_turn() -> None:
    engine = Engine(total=6, size=2, max_running=2)
    first = sequence(unlike(3), max_tokens=9)
    prompt = unlike(4)
    parent = sequence(prompt, max_tokens=8)
    children = [sequence(prompt, max_tokens=8, parent=parent) for _ in range(2)]
    engine.add(first)
    engine.add(parent, *children)
    engine.run()
    assert parent.preemptions > 0
    assert [child.drawn for child in children] == [8, 8]


def test_a_fresh_child_computes_its_prompt() -> None:
    engine = Engine()
    parent = sequence(range(6), fresh=True)
    child = sequence(range(6), parent=parent, fresh=True)
    engine.add(parent, child)
    engine.run()
    assert (parent.cached, child.cached) == (0, 0)


def test_children_wait_for_the_prompt_even_when_overdue() -> None:
    engine = Engine(token_budget=8, patience=1.0)
    parent = sequence(range(14))
    child = sequence(range(14), parent=parent)
    engine.add(parent, child)
    engine.now += 10
    chunks = [chunk for step in iter(engine.step, None) for chunk in step.chunks]
    assert next((c.start, c.count) for c in chunks if c.sequence is child) == (13, 1)


def test_an_overdue_child_of_a_later_parent_blocks_nobody() -> None:
    engine = Engine(max_running=1, patience=1.0)
    blocker = sequence(unlike(3), max_tokens=5)
    engine.add(blocker)
    engine.step()
    parent = sequence(range(9))
    engine.add(parent, sequence(range(9), parent=parent), sequence(unlike(3)))
    engine.now += 10
    engine.run()


class Coming:
    """Chunks on their way, of which nothing is used in the end."""

    def __init__(self, *, needed: bool = False, coming: bool = True, brings: int = 0) -> None:
        self.coming, self.needed, self.brings, self.released_times = coming, needed, brings, 0

    def held(self, idle: bool) -> bool:
        return self.coming and (self.needed or not idle)

    def likely(self, first: int) -> int:
        return self.brings

    def admitted(self, sequence: Sequence) -> None:
        return None

    def released(self, sequence: Sequence) -> None:
        self.released_times += 1

    def prefilled(self, sequence: Sequence, pool: KvPool, slots: Tensor) -> None:
        raise AssertionError("nobody computes here")

    def scored(self, sequence: Sequence, scores: Tensor) -> None:
        raise AssertionError("nobody draws here")

    @property
    def used(self) -> Used:
        return NO_CHUNKS


def holding(prompt: list[int], chunks: Coming, max_tokens: int = 4) -> Sequence:
    return Sequence(prompt, SamplingParams(max_tokens=max_tokens), salt="reuse", reuse=chunks)


def test_what_chunks_bring_is_cheap() -> None:
    engine = Engine(total=200, max_running=1)
    reusing = holding(unlike(40), Coming(coming=False, brings=35))
    large, small = sequence(unlike(30)), sequence(unlike(10))
    engine.add(large, small, reusing)
    engine.run()
    assert engine.admitted == [reusing, small, large]


def test_who_waits_for_chunks_is_passed_over_and_blocks_nobody() -> None:
    engine = Engine(total=200)
    chunks = Coming()
    held = holding(unlike(3), chunks)
    engine.add(held, *[sequence(unlike(10), max_tokens=3) for _ in range(3)])
    while engine.scheduler.depth() != (0, 1):
        engine.step()
        assert held not in engine.admitted
    engine.step()  # nobody else is left
    assert held in engine.admitted
    chunks.coming = False
    engine.run()
    assert chunks.released_times == 1


def test_who_waits_for_chunks_goes_on_when_they_are_there() -> None:
    engine = Engine(total=200)
    chunks = Coming()
    held = holding(unlike(3), chunks)
    engine.add(sequence(unlike(3), max_tokens=60), held)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.depth() == (1, 1)
    chunks.coming = False
    engine.step()
    assert held in engine.admitted
    engine.run()


def test_of_those_who_wait_for_chunks_one_goes_first_when_nobody_runs() -> None:
    engine = Engine(total=200)
    rows = [holding(unlike(3), Coming(), max_tokens=1) for _ in range(3)]
    engine.add(*rows)
    for left in (2, 1, 0):
        engine.step()
        assert engine.scheduler.depth() == (0, left)


def test_who_waits_for_chunks_is_not_overtaken_for_ever() -> None:
    """Overdue it is admitted, whatever has come; and so is one that is worth waiting for even when nobody runs."""
    engine = Engine(total=10, size=4, max_running=2, patience=20.0)
    held = holding(unlike(30), Coming(needed=True), max_tokens=2)
    engine.add(held)
    assert engine.step() is None
    assert engine.scheduler.depth() == (0, 1)
    later: list[Sequence] = []
    for _ in range(60):
        later.append(sequence(unlike(8), max_tokens=4))
        engine.add(later[-1])
        engine.step()
    assert held.state is State.FINISHED
    overtook = engine.admitted[: engine.admitted.index(held)]
    assert overtook
    assert all(one.arrived < held.arrived + 20.0 for one in overtook)
    engine.scheduler.cancel(later)
    engine.run()


def test_chunks_are_let_go_of_with_the_blocks() -> None:
    engine = Engine(total=6, size=2, max_running=2)
    first, chunks = sequence(unlike(3), max_tokens=9), Coming()
    chunks.coming = False
    second = holding(unlike(4), chunks, max_tokens=8)
    waiting = Coming()
    engine.add(first, second, third := holding(unlike(3), waiting))
    while not second.preemptions:
        engine.step()
    assert chunks.released_times == 1
    engine.scheduler.cancel([third])
    assert waiting.released_times == 1
    engine.run()
    assert chunks.released_times == second.preemptions + 1


def test_all_or_none_are_added() -> None:
    engine = Engine(max_running=1, max_waiting=3)
    engine.add(*[sequence(unlike(3)) for _ in range(5)])  # nobody waits: taken whole
    with pytest.raises(QueueFull):
        engine.add(sequence(unlike(3)))
    assert engine.scheduler.depth() == (0, 5)
    engine.run()
    good = sequence(unlike(3))
    with pytest.raises(RequestError, match="empty"):
        engine.add(good, sequence([]))
    with pytest.raises(ContextTooLong):
        engine.add(good, sequence(unlike(1000)))
    assert engine.scheduler.depth() == (0, 0)
    engine.add(good)
    with pytest.raises(ValueError, match="once"):
        engine.add(good)
    engine.run()
    with pytest.raises(ValueError, match="once"):
        engine.add(good)


def test_a_child_fits_its_parent() -> None:
    engine = Engine()
    parent = sequence(range(5))
    with pytest.raises(ValueError, match="with its parent"):
        engine.add(sequence(range(5), parent=parent))
    with pytest.raises(ValueError, match="parent's prompt"):
        engine.add(parent, sequence(range(6), parent=parent))
    with pytest.raises(ValueError, match="parent's prompt"):
        engine.add(parent, sequence(range(5), parent=parent, tenant="other"))
    assert engine.scheduler.depth() == (0, 0)


def test_cancellation_while_a_step_runs() -> None:
    engine = Engine()
    one, two = sequence(range(6)), sequence(unlike(6))
    engine.add(one, two)
    step = engine.begin()
    assert step is not None
    engine.scheduler.cancel([one, one, sequence(range(3))])
    engine.end(step)
    assert (one.drawn, one.state, two.drawn) == (0, State.FINISHED, 1)
    engine.run()


def test_a_missing_token_is_an_error() -> None:
    engine = Engine()
    engine.add(sequence(range(6)))
    step = engine.begin()
    assert step is not None
    with pytest.raises(KeyError):
        engine.scheduler.complete(step, {})


@pytest.mark.parametrize(("running", "budget", "patience"), [(0, 8, 1.0), (9, 8, 1.0), (4, 8, 0.0)])
def test_settings_are_checked(running: int, budget: int, patience: float) -> None:
    blocks = BlockManager(8, 4, root=b"")
    with pytest.raises(ValueError, match="must be"):
        Scheduler(blocks, max_running=running, max_waiting=1, token_budget=budget, patience=patience)


def test_many_waiting_with_little_room() -> None:
    chance = random.Random(1)
    engine = Engine(total=40, max_running=6, max_waiting=1000, patience=200.0)
    shared = unlike(40)
    rows = [
        sequence(shared[: chance.randrange(41)] + unlike(chance.randrange(1, 60)), 6, tenant=f"t{chance.randrange(30)}")
        for _ in range(200)
    ]
    engine.add(*rows)
    engine.run()
    assert all(row.drawn == 6 for row in rows)
    assert engine.blocks.prefix_hits > 0


class Mix(RuleBasedStateMachine):
    """Whatever is added, cancelled, cleared and drawn: the blocks hold what they should, and all ends."""

    @initialize(
        total=st.integers(3, 20),
        size=st.integers(1, 4),
        running=st.integers(1, 6),
        budget=st.integers(6, 20),
        patience=st.sampled_from([1.0, 10.0, 1000.0]),
        seed=st.integers(0, 99),
    )
    def start(self, total: int, size: int, running: int, budget: int, patience: float, seed: int) -> None:
        chance = random.Random(seed)
        self.engine = Engine(
            total=total,
            size=size,
            max_running=running,
            max_waiting=12,
            token_budget=budget,
            patience=patience,
            draw=lambda _: chance.randrange(2),
        )
        self.room = total * size
        self.rows: list[Sequence] = []
        self.flying: Step | None = None

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        answers=st.integers(1, 3),
        max_tokens=st.integers(1, 12),
        tenant=st.sampled_from(["a", "a", "b"]),
        fresh=st.integers(0, 7).map(lambda n: n == 0),
    )
    def add(self, prompt: list[int], answers: int, max_tokens: int, tenant: str, fresh: bool) -> None:
        parent = sequence(prompt, max_tokens, tenant=tenant, fresh=fresh)
        children = [sequence(prompt, max_tokens, tenant=tenant, parent=parent, fresh=fresh) for _ in range(answers - 1)]
        before = self.engine.scheduler.depth()
        try:
            self.engine.add(parent, *children)
        except ContextTooLong:
            assert len(prompt) + max_tokens - 1 > self.room
        except QueueFull:
            assert before[1] + answers > 12
        else:
            self.rows += [parent, *children]
            return
        assert self.engine.scheduler.depth() == before

    @precondition(lambda self: self.flying is None)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            oldest = self.oldest()
            decoding = [row for row in self.running() if len(row.tokens) - row.computed == 1]
            drawn = {row: row.drawn for row in decoding}
            step = self.engine.step()
            if step is None:
                assert oldest is None
                return
            assert oldest not in step.preempted
            for row in decoding:
                assert row.drawn == drawn[row] + 1 or row in step.preempted

    @precondition(lambda self: self.flying is None)
    @rule()
    def begin(self) -> None:
        self.flying = self.engine.begin()

    @precondition(lambda self: self.flying is not None)
    @rule()
    def end(self) -> None:
        assert self.flying is not None
        self.engine.end(self.flying)
        self.flying = None

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows[-8:]))
        self.engine.scheduler.cancel([row])
        assert row.state is State.FINISHED

    @rule(sure=st.integers(0, 3))
    def clear(self, sure: int) -> None:
        if not sure:
            self.engine.blocks.clear()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check(self.rows)

    def running(self) -> list[Sequence]:
        return [row for row in self.rows if row.state is State.RUNNING]

    def oldest(self) -> Sequence | None:
        return min(self.running(), key=lambda row: row.order, default=None)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        if self.flying is not None:
            self.engine.end(self.flying)
        self.engine.run()
        assert all(row.state is State.FINISHED for row in self.rows)
        self.engine.check()


TestMix = Mix.TestCase
TestMix.settings = settings(max_examples=80, stateful_step_count=40)
