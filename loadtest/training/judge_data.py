"""What the judge learns from: the pair sets, split by group, and one epoch's mix of real and edited pairs."""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

from loadtest.data import read_rows, text_field
from loadtest.training import judge_edits as edits

HELD_OUT = 15
"""Percent of the groups that training never sees."""
GROUP = 60
"""Most texts of a group."""


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

NOISY = ("mrpc", "rqe_medical", "sts_genres", "stsb")
"""Sets whose labels mean something else (news, entailment, a scale): trained on, not calibrated with."""


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


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """What is learnt from and what is held out; a text's group is wholly on one side.

    A group is what pairs of label 1 link, and pairs of label 0 too while it stays small. Of a pair across two groups
    that lie on different sides neither gets anything.
    """
    groups = _Groups()
    for sample in sorted(samples, key=lambda sample: -sample.label):
        groups.join(_key(sample.a), _key(sample.b))
    learn: list[Sample] = []
    held: list[Sample] = []
    for sample in samples:
        out = {_bucket(groups.root(_key(text))) < HELD_OUT for text in (sample.a, sample.b)}
        if len(out) == 1:
            (held if out == {True} else learn).append(sample)
    return learn, held


class _Groups:
    """Texts that belong together, at most GROUP of them."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def root(self, key: str) -> str:
        """The text that stands for the group."""
        parents = self._parents
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = parents.setdefault(parent, parent)
            key = parents[key]
        return key

    def join(self, first: str, second: str) -> None:
        """Make two groups one, if it is not too large."""
        kept, gone = sorted((self.root(first), self.root(second)))
        size = self._sizes.get(kept, 1) + self._sizes.get(gone, 1)
        if kept != gone and size <= GROUP:
            self._parents[gone], self._sizes[kept] = kept, size


def _key(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _bucket(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=4).digest()) % 100


DERIVED = {"covid_similar": 0.5, "covidq_pairs": 0.7, "gsmplus": 0.5, "mqp_medical": 0.25, "paws_x_en": 0.15}
"""Pairs seen in an epoch that follow from two others, as a share of the set's rows."""


def derived(samples: Sequence[Sample], all_samples: Sequence[Sample]) -> list[Sample]:
    """Pairs that follow: what serves one of two like questions serves the other, what does not does not either.

    `all_samples`, held-out ones too, are what is known already and not said again.
    """
    known = {frozenset((_key(sample.a), _key(sample.b))) for sample in all_samples}
    found = []
    for name in DERIVED:
        around: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for sample in samples:
            if sample.set == name:
                around[_key(sample.a)].append((sample.b, sample.label))
                around[_key(sample.b)].append((sample.a, sample.label))
        for others in around.values():
            for (one, first), (other, second) in combinations(others, 2):
                pair = frozenset((_key(one), _key(other)))
                if len(pair) == 2 and max(first, second) == 1 and pair not in known:
                    known.add(pair)
                    found.append(Sample(one, other, first * second, name))
    return found


def epoch(
    samples: Sequence[Sample],
    follow: Sequence[Sample],
    chance: random.Random,
    shares: Mapping[str, float] = MappingProxyType(SHARES),
) -> list[Sample]:
    """One epoch's pairs in random order: every set by its share, those that `follow`, and edited pairs."""
    by_set, following = _by_set(samples), _by_set(follow)
    mix: list[Sample] = []
    for name, rows in by_set.items():
        share = shares[name]
        mix += rows * int(share) + chance.sample(rows, int(len(rows) * (share - int(share))))
        others = following.get(name, [])
        mix += chance.sample(others, min(len(others), int(len(rows) * DERIVED.get(name, 0.0))))
    mix = [_turned(sample, chance) for sample in mix]
    mix += _edited_pairs(by_set, chance)
    chance.shuffle(mix)
    return mix


def _by_set(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.set].append(sample)
    return found


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
