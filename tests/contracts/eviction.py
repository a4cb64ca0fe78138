"""What every evictor must do; a test class for an evictor inherits from this one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from policies.eviction import Evictor

SIZES = np.full(4096, 10, np.int64)
ALL: list[Mapping[str, int]] = [{"a": 1 << 30, "b": 1 << 30}]


class EvictorContract:
    def make(self) -> Evictor:
        raise NotImplementedError

    @pytest.fixture
    def evictor(self) -> Evictor:
        return self.make()

    def fill(self, evictor: Evictor, slots: range, category: str = "a", now: float = 0.0) -> None:
        for slot in slots:
            evictor.admit(slot, category, size=10, cost=1.0, now=now + slot)

    def test_takes_just_enough(self, evictor: Evictor) -> None:
        self.fill(evictor, range(100))
        assert len(evictor.victims(ALL, SIZES, 25, 200.0)) == 3

    def test_nothing_needed_nothing_taken(self, evictor: Evictor) -> None:
        self.fill(evictor, range(10))
        assert evictor.victims(ALL, SIZES, 0, 20.0) == []
        assert self.make().victims(ALL, SIZES, 100, 20.0) == []

    def test_a_category_that_is_not_named_is_protected(self, evictor: Evictor) -> None:
        self.fill(evictor, range(10), "a")
        self.fill(evictor, range(10, 20), "b")
        assert set(evictor.victims([{"b": 1 << 30}], SIZES, 1 << 20, 50.0)) == set(range(10, 20))

    def test_takes_no_more_than_is_allowed(self, evictor: Evictor) -> None:
        self.fill(evictor, range(50))
        assert len(evictor.victims([{"a": 35}], SIZES, 1 << 20, 100.0)) == 3
        assert evictor.victims([{"a": 9}], SIZES, 1 << 20, 100.0) == []

    def test_uses_up_one_round_before_the_next(self, evictor: Evictor) -> None:
        self.fill(evictor, range(10), "a")
        self.fill(evictor, range(10, 20), "b")
        victims = evictor.victims([{"b": 20}, {"a": 1000, "b": 1000}], SIZES, 40, 50.0)
        assert len(victims) == len(set(victims)) == 4
        assert all(10 <= slot < 20 for slot in victims[:2])

    def test_never_names_what_was_forgotten(self, evictor: Evictor) -> None:
        self.fill(evictor, range(100))
        for slot in range(0, 100, 2):
            evictor.forget(slot)
        evictor.forget(4000)
        assert len(evictor) == 50
        assert set(evictor.victims(ALL, SIZES, 1 << 20, 200.0)) == set(range(1, 100, 2))

    def test_a_slot_that_comes_back_starts_anew(self, evictor: Evictor) -> None:
        self.fill(evictor, range(3))
        evictor.forget(1)
        evictor.admit(1, "b", size=10, cost=1.0, now=10.0)
        assert evictor.victims([{"b": 1 << 20}], SIZES, 1 << 20, 20.0) == [1]
        evictor.admit(1, "a", size=10, cost=1.0, now=30.0)
        assert len(evictor) == 3
        assert evictor.victims([{"b": 1 << 20}], SIZES, 1 << 20, 40.0) == []

    def test_what_was_hit_outlives_what_was_not(self, evictor: Evictor) -> None:
        self.fill(evictor, range(20))
        evictor.touch(0, 30.0)
        evictor.touch(3999, 30.0)
        assert 0 not in evictor.victims(ALL, SIZES, 190, 31.0)

    def test_equal_histories_give_equal_victims(self) -> None:
        orders = []
        for _ in range(2):
            evictor = self.make()
            self.fill(evictor, range(4000))
            for slot in range(0, 4000, 7):
                evictor.touch(slot, 5000.0 + slot)
            orders.append([evictor.victims(ALL, SIZES, 100, 10_000.0) for _ in range(3)])
        assert orders[0] == orders[1]

    def test_ties_go_by_slot(self, evictor: Evictor) -> None:
        for slot in (5, 3, 9, 1):
            evictor.admit(slot, "a", size=10, cost=1.0, now=0.0)
        assert evictor.victims(ALL, SIZES, 40, 1.0) == [1, 3, 5, 9]

    def test_a_draw_from_many_finds_poor_ones(self, evictor: Evictor) -> None:
        self.fill(evictor, range(4000))
        for slot in range(2000, 4000):
            evictor.touch(slot, 5000.0, hits=3)
        victims = evictor.victims(ALL, SIZES, 1000, 5001.0)
        assert len(victims) == 100
        assert all(slot < 2000 for slot in victims)

    def test_a_draw_from_many_can_take_them_all(self, evictor: Evictor) -> None:
        self.fill(evictor, range(4000))
        assert len(evictor.victims(ALL, SIZES, 40_000, 5000.0)) == 4000

    def test_not_taken_until_it_is_forgotten(self, evictor: Evictor) -> None:
        self.fill(evictor, range(10))
        assert evictor.victims(ALL, SIZES, 30, 20.0) == evictor.victims(ALL, SIZES, 30, 20.0)
        assert len(evictor) == 10
