"""The books of the pool: what is shared, copied, kept and forgotten."""

from __future__ import annotations

from collections.abc import Sequence as Row

import pytest

from engine.blocks import AllCleared, BlockEvent, BlockManager, BlockRemoved, BlockStored, Inconsistent
from engine.hashing import chain, origin
from engine.sequence import Sequence
from tests.engine.shadow import Pool, sequence

SIZE = 4


class Books:
    """A manager with its pool; `compute` does what scheduler and runner would."""

    def __init__(self, total: int = 8) -> None:
        self.events: list[BlockEvent] = []
        self.blocks = BlockManager(total, SIZE, root=b"model", sink=self.events.append)
        self.pool = Pool(total, SIZE)

    def compute(self, sequence: Sequence, upto: int | None = None) -> None:
        upto = len(sequence.tokens) if upto is None else upto
        assert self.blocks.reserve(sequence, upto)
        self.pool.copy(self.blocks.take_copies())
        self.pool.write(sequence, sequence.computed, upto - sequence.computed)
        sequence.computed = upto
        self.blocks.commit(sequence)
        self.pool.verify(sequence)
        self.blocks.check()

    def computed(self, prompt: Row[int], tenant: str = "") -> Sequence:
        new = sequence(prompt, tenant=tenant)
        assert self.blocks.admit(new)
        self.compute(new)
        return new

    def counts(self) -> tuple[int, int, int]:
        self.blocks.check()
        return self.blocks.free(), self.blocks.cached(), self.blocks.used()


def test_blocks_come_and_go() -> None:
    books = Books()
    one = books.computed(range(10))
    assert books.counts() == (5, 0, 3)
    books.blocks.release(one)
    assert books.counts() == (6, 2, 0)
    assert (one.table, one.computed) == ([], 0)


def test_a_known_prefix_is_shared() -> None:
    books = Books()
    one = books.computed(range(10))
    two = sequence([*range(8), 50, 51, 52])
    assert books.blocks.lookup(two) == 8
    assert books.blocks.admit(two)
    assert (two.computed, two.cached, two.table[:2]) == (8, 8, one.table[:2])
    books.compute(two)
    assert books.counts() == (4, 0, 4)
    assert (books.blocks.prefix_queries, books.blocks.prefix_hits) == (21, 8)
    books.blocks.release(one)
    books.pool.verify(two)


def test_a_wholly_known_prompt_has_its_last_block_copied() -> None:
    books = Books()
    one = books.computed(range(8))
    two = sequence(range(8))
    assert books.blocks.lookup(two) == 7
    assert books.blocks.admit(two)
    assert two.computed == 7
    assert two.table[0] == one.table[0]
    assert books.blocks.take_copies() == [(one.table[1], two.table[1])]
    assert books.blocks.take_copies() == []


def test_a_wholly_known_prompt_that_nobody_holds_is_copied_too() -> None:
    books = Books()
    books.blocks.release(books.computed(range(8)))
    two = books.computed(range(8))
    assert two.cached == 7
    assert books.counts() == (5, 1, 2)


def test_without_room_for_a_copy_the_known_block_is_written_to() -> None:
    books = Books(total=2)
    books.blocks.release(books.computed(range(8)))
    two = sequence(range(8))
    assert books.blocks.admit(two)
    assert two.cached == 7
    assert books.blocks.take_copies() == []
    books.compute(two)
    assert books.counts() == (0, 0, 2)
    assert books.blocks.lookup(sequence(range(9))) == 8
    assert [type(event) for event in books.events] == [BlockStored, BlockRemoved, BlockStored]


def test_equal_blocks_computed_twice_are_known_once() -> None:
    books = Books()
    one, two = sequence(range(8)), sequence(range(8))
    assert books.blocks.admit(one)
    assert books.blocks.admit(two)
    books.compute(one)
    books.compute(two)
    assert books.counts() == (4, 0, 4)
    books.blocks.release(two)
    assert books.counts() == (6, 0, 2)
    books.blocks.release(one)
    assert books.counts() == (6, 2, 0)


def test_own_blocks_take_the_place_of_equal_ones_that_were_forgotten() -> None:
    books = Books(total=6)
    one, two = sequence(range(4)), sequence([*range(4), 9])
    assert books.blocks.admit(one)
    assert books.blocks.admit(two)
    books.compute(one)
    books.compute(two)
    books.blocks.release(one)
    other = books.computed(range(100, 116))  # needs all that is left
    assert books.blocks.lookup(sequence(range(5))) == 0
    books.blocks.release(other)
    two.tokens.extend([10, 11, 12])
    books.compute(two)
    assert books.blocks.lookup(sequence([*two.tokens, 1])) == 8


def test_tenants_and_salts_share_nothing() -> None:
    books = Books()
    books.computed(range(8), tenant="a")
    salted = sequence(range(8), tenant="a")
    salted.salt = "s"
    assert books.blocks.lookup(sequence(range(8), tenant="a")) == 7
    assert books.blocks.lookup(sequence(range(8), tenant="b")) == 0
    assert books.blocks.lookup(salted) == 0


def test_a_fresh_sequence_computes_all() -> None:
    books = Books()
    books.computed(range(8))
    fresh = sequence(range(8), fresh=True)
    assert books.blocks.lookup(fresh) == 0
    assert books.blocks.admit(fresh)
    assert fresh.computed == 0
    fresh.tokens.append(3)
    assert books.blocks.lookup(fresh) == 8


def test_an_equal_hash_of_other_tokens_is_no_hit() -> None:
    blocks = BlockManager(8, SIZE, root=b"", digest=lambda parent, tokens: b"always the same")
    one, two = sequence(range(4)), sequence(range(50, 55))
    assert blocks.admit(one)
    one.computed = 4
    blocks.commit(one)
    assert blocks.lookup(two) == 4
    assert blocks.admit(two)
    assert two.computed == 0
    blocks.check()


def test_hashes_are_the_same_everywhere() -> None:
    first = chain(origin(b"model", "tenant", ""), [1, 2, 2**32 - 1])
    assert first.hex() == "d2124ec283de4ed4aab78a5c3720b079"
    assert origin(b"ab", "c") != origin(b"a", "bc")


def test_the_ends_of_prompts_go_first_and_the_longest_unused_of_them() -> None:
    books = Books(total=6)
    books.blocks.release(books.computed(range(12)))
    books.blocks.release(books.computed([*range(4), *range(60, 68)]))  # uses the first block again
    books.computed(range(100, 108))  # takes the free one, and one that was known
    assert books.blocks.lookup(sequence(range(13))) == 8
    assert books.blocks.lookup(sequence([*range(4), *range(60, 69)])) == 12


def test_a_fork_shares_and_copies_what_it_writes_to() -> None:
    books = Books()
    parent = books.computed(range(6))
    parent.tokens.append(70)
    child = sequence(range(6), parent=parent)
    assert books.blocks.fork(parent, child)
    assert (child.computed, child.cached, child.table[0]) == (5, 5, parent.table[0])
    assert books.blocks.take_copies() == [(parent.table[1], child.table[1])]
    books.pool.copy([(parent.table[1], child.table[1])])
    books.compute(child)
    books.compute(parent)
    child.tokens.extend([80, 81])
    books.compute(child)
    books.pool.verify(parent)
    assert books.counts() == (5, 0, 3)


def test_the_parent_too_copies_what_is_shared() -> None:
    books = Books()
    parent = books.computed(range(7))
    child = sequence(range(7), parent=parent)
    assert books.blocks.fork(parent, child)
    grandchild = sequence(range(7), parent=child)
    with pytest.raises(ValueError, match="computed"):
        books.blocks.fork(sequence(range(7)), grandchild)
    # The child's block is still to be copied when it is copied again: in order, both are right.
    assert books.blocks.fork(child, grandchild)
    (_, one), (source, two) = books.blocks.take_copies()
    assert (source, [one, two]) == (one, [child.table[1], grandchild.table[1]])


def test_a_fork_of_full_blocks_copies_nothing() -> None:
    books = Books()
    parent = books.computed(range(5))
    child = sequence(range(5), parent=parent)
    assert books.blocks.fork(parent, child)
    assert books.blocks.take_copies() == []
    assert child.table[0] == parent.table[0]
    books.compute(child)


def test_all_or_nothing() -> None:
    books = Books(total=3)
    one = books.computed(range(8))
    two = sequence(range(12))
    before = books.counts()
    assert books.blocks.lookup(two) == 8
    assert not books.blocks.admit(two, spare=1)
    assert books.counts() == before
    assert two.table == []
    assert not books.blocks.reserve(one, 17)
    assert len(one.table) == 2
    assert books.blocks.admit(two)
    assert not books.blocks.fork(one, sequence(range(8), parent=one))
    assert books.counts() == (0, 0, 3)


def test_known_blocks_that_nobody_holds_are_not_counted_as_room() -> None:
    books = Books(total=4)
    books.blocks.release(books.computed(range(12)))
    assert not books.blocks.admit(sequence(range(16)), spare=1)
    assert books.counts() == (1, 3, 0)
    assert books.blocks.admit(sequence(range(16)))
    assert books.counts() == (0, 0, 4)


def test_clearing_forgets_all() -> None:
    books = Books()
    books.blocks.release(books.computed(range(8)))
    one = books.computed(range(50, 58))
    books.blocks.clear()
    assert isinstance(books.events[-1], AllCleared)
    assert books.counts() == (6, 0, 2)
    one.tokens.extend([1, 2, 3, 4])
    books.compute(one)
    child = sequence(range(50, 58), parent=one)
    assert books.blocks.fork(one, child)
    books.compute(child)
    assert books.blocks.lookup(sequence(one.tokens)) == 0
    books.blocks.release(one)
    books.blocks.release(child)
    assert books.counts() == (8, 0, 0)


def test_events_tell_what_is_known() -> None:
    books = Books(total=3)
    one = books.computed(range(6))
    one.tokens.extend(range(6, 13))
    books.compute(one, 12)
    first, second, third = one.hashes
    assert books.events == [
        BlockStored((first,), None, tuple(range(4)), SIZE),
        BlockStored((second, third), first, tuple(range(4, 12)), SIZE),
    ]
    books.events.clear()
    books.blocks.release(one)
    books.computed(range(100, 108))
    assert books.events[0] == BlockRemoved((third, second))


def test_the_generation_tells_when_a_lookup_no_longer_holds() -> None:
    books = Books()
    before = books.blocks.generation
    one = sequence(range(8))
    assert books.blocks.admit(one)
    assert books.blocks.generation == before
    books.compute(one)
    assert books.blocks.generation > before


def test_a_mistake_in_the_books_is_found() -> None:
    books = Books()
    one = books.computed(range(8))
    one.table.append(one.table[0])
    with pytest.raises(Inconsistent, match="reference counts"):
        books.blocks.check()
    one.table.pop()
    one.computed = 9
    with pytest.raises(Inconsistent, match="9 tokens"):
        books.blocks.check()
    one.computed, one.tokens[0] = 8, 77
    with pytest.raises(Inconsistent, match="other tokens"):
        books.blocks.check()


@pytest.mark.parametrize(("total", "size"), [(0, 4), (4, 0)])
def test_a_pool_holds_something(total: int, size: int) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        BlockManager(total, size, root=b"")
