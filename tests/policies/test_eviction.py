from __future__ import annotations

import numpy as np

from policies.eviction import Evictor, Lru, ValuePerByte
from tests.contracts.eviction import ALL, SIZES, EvictorContract


class TestLru(EvictorContract):
    def make(self) -> Evictor:
        return Lru(seed=1)

    def test_the_one_that_was_not_used_for_longest(self) -> None:
        evictor = self.make()
        self.fill(evictor, range(3))
        evictor.touch(0, 10.0)
        assert evictor.victims(ALL, SIZES, 30, 11.0) == [1, 2, 0]


class TestValuePerByte(EvictorContract):
    def make(self) -> Evictor:
        return ValuePerByte(seed=1)

    def test_cheap_before_dear(self) -> None:
        evictor = self.make()
        for slot, cost in enumerate((5.0, 0.5, 2.0)):
            evictor.admit(slot, "a", size=100, cost=cost, now=0.0)
        assert evictor.victims(ALL, SIZES, 30, 1.0) == [1, 2, 0]

    def test_large_before_small(self) -> None:
        evictor = self.make()
        for slot, size in enumerate((100, 10_000, 1000)):
            evictor.admit(slot, "a", size=size, cost=1.0, now=0.0)
        assert evictor.victims(ALL, SIZES, 30, 1.0) == [1, 2, 0]

    def test_hits_fade(self) -> None:
        evictor = ValuePerByte(half_life=60.0)
        evictor.admit(0, "a", size=10, cost=1.0, now=0.0)
        evictor.touch(0, 0.0, hits=100)
        evictor.admit(1, "a", size=10, cost=1.0, now=600.0)
        assert evictor.victims(ALL, SIZES, 10, 600.0) == [0]

    def test_an_answer_that_cost_nothing_is_still_ranked(self) -> None:
        evictor = self.make()
        evictor.admit(0, "a", size=10, cost=0.0, now=0.0)
        evictor.admit(1, "a", size=1000, cost=0.0, now=0.0)
        assert evictor.victims(ALL, np.full(2, 10, np.int64), 10, 1.0) == [1]
