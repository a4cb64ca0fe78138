"""Plans follow from what was measured; clocks are simulated."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachestore.kv.controller import Controller, Loaded, Rate, Recomputed, Source, Wanted, smallest_within
from cachestore.kv.shelf import Tier

MB = 1 << 20


class Machine:
    """Tiers and a model that take the time they take."""

    def __init__(self, *, prefill: float, tiers: dict[Tier, tuple[float, float]], codecs: dict[str, float]) -> None:
        """Tokens a second; delay and bytes a second by tier; bytes a second by codec."""
        self.prefill, self.tiers, self.codecs = prefill, tiers, codecs

    def teach(self, controller: Controller, noise: float = 0.0) -> None:
        dice = random.Random(1)
        for _ in range(200):
            tokens, size = dice.randint(16, 2048), dice.randint(MB // 8, 64 * MB)
            blur = 1 + noise * (dice.random() - 0.5)
            controller.computed(tokens, tokens / self.prefill * blur)
            for tier, (delay, speed) in self.tiers.items():
                for codec, decoding in self.codecs.items():
                    source = Source(tier, codec, size, size * 4)
                    controller.transferred(source, (delay + size / speed) * blur, size * 4 / decoding * blur)

    def seconds(self, source: Source) -> float:
        delay, speed = self.tiers[source.tier]
        return delay + source.size / speed + source.plain / self.codecs[source.codec]


MACHINE = Machine(
    prefill=8_000.0,
    tiers={Tier.MEMORY: (0.0005, 8e9), Tier.DISK: (0.004, 1e9), Tier.REMOTE: (0.02, 5e7)},
    codecs={"raw": 8e9, "entropy": 5e8},
)


def taught(noise: float = 0.0) -> Controller:
    controller = Controller()
    MACHINE.teach(controller, noise)
    return controller


def sources(tier: Tier, plain: int) -> list[Source]:
    return [Source(tier, "raw", plain, plain), Source(tier, "entropy", plain // 4, plain)]


def test_a_rate_learns_delay_and_speed() -> None:
    rate = Rate(1.0)
    for size in (1e6, 5e6, 2e7, 3e6) * 10:
        rate.observe(size, 0.01 + size / 1e9)
    assert rate.speed == pytest.approx(1e9, rel=0.01)
    assert rate.seconds(1e8) == pytest.approx(0.11, rel=0.01)


def test_a_rate_follows_a_change() -> None:
    rate = Rate(1e9)
    for speed in (1e9, 1e8):
        for size in (1e6, 5e6, 2e7) * 40:
            rate.observe(size, size / speed)
    assert rate.seconds(1e7) == pytest.approx(0.1, rel=0.05)


def test_equal_amounts_give_a_ratio() -> None:
    rate = Rate(1.0, delay=9.0)
    rate.observe(4e6, 0.004)
    assert rate.seconds(8e6) == pytest.approx(0.008)


def test_what_says_nothing_changes_nothing() -> None:
    rate = Rate(2.0, delay=1.0)
    rate.observe(0, 1.0)
    rate.observe(5, 0.0)
    assert rate.seconds(4) == 3.0
    assert rate.seconds(0) == 0.0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(1.0, 1e9), st.floats(1e-6, 100.0)), min_size=1, max_size=30))
def test_no_rate_is_nonsense(seen: list[tuple[float, float]]) -> None:
    rate = Rate(1.0)
    for amount, seconds in seen:
        rate.observe(amount, seconds)
    times = [rate.seconds(amount) for amount in (1.0, 1e3, 1e6, 1e9)]
    assert all(math.isfinite(t) and t >= 0 for t in times)
    assert times == sorted(times)


def test_the_codec_that_is_ready_first() -> None:
    plain = 64 * MB
    choices = {
        tier: taught().plan([Wanted(4096, sources(tier, plain))]).choices[0] for tier in (Tier.MEMORY, Tier.DISK)
    }
    memory, disk = choices[Tier.MEMORY], choices[Tier.DISK]
    assert isinstance(memory, Loaded)
    assert memory.source.codec == "raw"
    assert isinstance(disk, Loaded)
    assert disk.source.codec == "raw", "decoding at 500 MB/s is slower than reading at 1 GB/s"
    remote = min(sources(Tier.REMOTE, plain), key=MACHINE.seconds)
    [far] = taught().plan([Wanted(40_960, sources(Tier.REMOTE, plain))]).choices
    assert isinstance(far, Loaded)
    assert far.source == remote
    assert far.seconds == pytest.approx(MACHINE.seconds(remote), rel=0.05)
    assert remote.codec == "entropy"


def test_a_short_chunk_far_away_is_computed() -> None:
    plan = taught().plan([Wanted(64, sources(Tier.REMOTE, MB)), Wanted(64, sources(Tier.MEMORY, MB)), Wanted(64, [])])
    assert [type(choice) for choice in plan.choices] == [Recomputed, Loaded, Recomputed]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(16, 4096), st.sampled_from(list(Tier))), max_size=8), st.floats(0, 1))
def test_one_hides_the_other(chunks: list[tuple[int, Tier]], least: float) -> None:
    controller = taught()
    wanted = [Wanted(tokens, sources(tier, tokens * 20_000)) for tokens, tier in chunks]
    plan = controller.plan(wanted, rest=48, least=least)
    tokens = sum(one.tokens for one in wanted)
    assert least <= plan.ratio <= 1.0
    if plan.ratio not in (least, 1.0):
        assert plan.computing == pytest.approx(plan.loading, rel=0.1, abs=1e-4)
    assert plan.computing <= (48 + tokens) / MACHINE.prefill * 1.05 + 1e-3
    for one, choice in zip(wanted, plan.choices, strict=True):
        if isinstance(choice, Loaded):
            assert choice.seconds <= one.tokens / MACHINE.prefill * 1.05 + 1e-3
            assert choice.source in one.sources


def test_noise_does_not_matter_much() -> None:
    wanted = [Wanted(512, sources(Tier.DISK, 64 * MB)) for _ in range(6)]
    calm, noisy = taught().plan(wanted), taught(noise=0.5).plan(wanted)
    assert noisy.loading == pytest.approx(calm.loading, rel=0.3)
    assert noisy.ratio == pytest.approx(calm.ratio, rel=0.5)


def test_nothing_to_load() -> None:
    plan = Controller(prefill=100.0).plan([], rest=50, least=0.2)
    assert (plan.choices, plan.ratio, plan.loading, plan.seconds) == ((), 0.2, 0.0, 0.5)


@pytest.mark.parametrize("least", [-0.1, 1.1])
def test_shares_are_shares(least: float) -> None:
    with pytest.raises(ValueError, match="least"):
        Controller().plan([], least=least)


@pytest.mark.parametrize(("speed", "delay", "half"), [(0.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, 0.0, 0.0)])
def test_impossible_rates(speed: float, delay: float, half: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        Rate(speed, delay, half=half)


def test_the_smallest_codec_that_is_good_enough() -> None:
    loss, size = {"raw": 0.0, "int8": 1e-4, "int4": 1e-2}, {"raw": 1.0, "int8": 0.5, "int4": 0.3}
    assert smallest_within(loss, size, 1e-3) == "int8"
    assert smallest_within(loss, size, 1.0) == "int4"
    assert smallest_within(loss, size, -1.0) == "raw"


@pytest.mark.parametrize("apart", [True, False])
def test_decoding_on_the_cores_that_compute_makes_nothing_free(apart: bool) -> None:
    controller = Controller(prefill=1_000.0, reading=1e9, decoding=1e6, apart=apart)
    plan = controller.plan([Wanted(1_000, [Source(Tier.DISK, "raw", 1_000, 500_000)])], least=0.15)
    assert plan.ratio == (pytest.approx(0.5, abs=0.01) if apart else 0.15)
