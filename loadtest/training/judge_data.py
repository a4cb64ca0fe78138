"""What the judge learns from: the pair sets, split by group, and one epoch's mix of real and edited pairs."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.data import read_rows, text_field
from loadtest.training import judge_edits as edits

HELD_OUT = 15
"""Percent of the groups that training never sees."""
GROUP = 60
"""Pairs; where equal texts link more than these, a pair's group is its first text alone."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Two questions and the wish: 1 where one answer serves both, 0 where not, between where people differ."""

    a: str
    b: str
    label: float
    set: str


SHARES = {
    "bitext_entity_swap": 1.0,
    "covid_similar": 1.0,
    "covidq_pairs": 1.5,
    "finance_adv": 3.0,
    "gsm8k_rephrase": 1.0,
    "gsm_symbolic_p2": 0.3,
    "gsmplus": 1.2,
    "medquad_neg": 0.25,
    "mqp_medical": 1.5,
    "mrpc": 0.25,
    "paws_x_en": 2.0,
    "qqp": 1.0,
    "rqe_medical": 0.12,
    "sts_genres": 0.3,
    "stsb": 0.3,
    "vsr_cache_cases": 4.0,
}
"""How often a row of a set is seen in an epoch."""


def read_sets(folder: Path) -> list[Sample]:
    """All pairs that people could decide. Raises DataError."""
    samples = []
    for name in SHARES:
        path = folder / f"{name}.jsonl.gz"
        for number, row in enumerate(read_rows(path), 1):
            if row["label"] in (0, 1):
                a, b = (text_field(path, number, row, key) for key in "ab")
                samples.append(Sample(a, b, float(row["label"]), name))
    return samples


def held_out(samples: Sequence[Sample]) -> list[bool]:
    """Which samples training must not see: pairs linked by an equal text stay on one side."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for sample in samples:
        first, second = sorted((root(_key(sample.a)), root(_key(sample.b))))
        parents[second] = first
    keys = [_key(sample.a) for sample in samples]
    sizes = Counter(root(key) for key in keys)
    groups = (root(key) if sizes[root(key)] <= GROUP else key for key in keys)
    return [_bucket(group) < HELD_OUT for group in groups]


def _key(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _bucket(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=4).digest()) % 100


def epoch(samples: Sequence[Sample], chance: random.Random) -> list[Sample]:
    """One epoch's pairs in random order: every set by its share, and edited pairs beside them."""
    by_set: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_set[sample.set].append(sample)
    mix: list[Sample] = []
    for name, rows in by_set.items():
        share = SHARES[name]
        mix += rows * int(share) + chance.sample(rows, int(len(rows) * (share - int(share))))
    mix = [_turned(sample, chance) for sample in mix]
    mix += _edited_pairs(by_set, chance)
    chance.shuffle(mix)
    return mix


def _turned(sample: Sample, chance: random.Random) -> Sample:
    return sample if chance.random() < 0.5 else Sample(sample.b, sample.a, sample.label, sample.set)


_EDITS = {
    "paws_x_en": (3000, edits.REORDER_NEGATIVE, edits.REORDER_POSITIVE),
    "mrpc": (400, edits.REORDER_NEGATIVE, edits.REORDER_POSITIVE),
    "stsb": (400, edits.NEGATIVE, edits.POSITIVE),
    "qqp": (3500, edits.NEGATIVE, edits.POSITIVE),
    "gsm8k_rephrase": (250, edits.NEGATIVE, edits.POSITIVE),
    "gsmplus": (200, edits.NEGATIVE, edits.POSITIVE),
    "mqp_medical": (500, edits.NEGATIVE, edits.POSITIVE),
    "covidq_pairs": (400, edits.NEGATIVE, edits.POSITIVE),
    "finance_adv": (60, edits.NEGATIVE, edits.POSITIVE),
    "bitext_entity_swap": (150, edits.NEGATIVE, edits.POSITIVE),
}
"""By set: edited pairs an epoch, rules that change the answer, rules that do not."""


def _edited_pairs(by_set: dict[str, list[Sample]], chance: random.Random) -> Iterator[Sample]:
    for name, (count, negative, positive) in _EDITS.items():
        rows = by_set.get(name, [])
        if not rows:
            continue
        names = [found for row in chance.sample(rows, min(len(rows), 400)) for found in edits.names_in(row.a)]
        made = (_edit(chance.choice(rows), negative, positive, names, chance) for _ in range(count))
        yield from (sample for sample in made if sample is not None)


def _edit(
    row: Sample, negative: Sequence[edits.Rule], positive: Sequence[edits.Rule], names: list[str], chance: random.Random
) -> Sample | None:
    """A pair of an original and an edited text; from pairs of label 1 also across the pair."""
    a, b = (row.a, row.b) if chance.random() < 0.5 else (row.b, row.a)
    base = b if row.label == 1 and chance.random() < 0.5 else a
    if chance.random() < 0.45:
        new = edits.edited(base, positive, chance)
        return None if new is None else Sample(a, new, 1.0, row.set)
    if chance.random() < 0.15 and (topics := edits.other_topic(a, chance)):
        return Sample(*topics, 0.0, row.set)
    if chance.random() < 0.3:
        base = edits.edited(base, positive, chance) or base
    new = edits.other_name(base, names, chance) if chance.random() < 0.12 else edits.edited(base, negative, chance)
    return None if new is None or new == a else Sample(a, new, 0.0, row.set)
