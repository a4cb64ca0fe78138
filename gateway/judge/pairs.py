"""How two questions become one row of tokens: the same for training and for judging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TEXT_TOKENS = 192
"""Tokens of one question, markers not counted; a longer question is not judged, as what differs may lie behind."""
PAIR_TOKENS = 2 * TEXT_TOKENS + 3
MARKS = 10
"""Five for each question: a token the other has not, one it has, with its left neighbour, its right one, both."""

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Row:
    """`[CLS] first [SEP] second [SEP]`."""

    ids: list[int]
    marks: list[int]
    second: int
    """Where the second question begins."""


def row(first: Ids, second: Ids, start: int, end: int) -> Row:
    """Lay out a pair; `start` and `end` are the markers' ids, which `first` and `second` do not have."""
    left = marks(first, second)
    right = [mark + MARKS // 2 for mark in marks(second, first)]
    both = 4
    return Row(
        [start, *first, end, *second, end],
        [both, *left, both, *right, both + MARKS // 2],
        len(first) + 2,
    )


def marks(ids: Ids, other: Ids) -> list[int]:
    """For each token: 0 = not in `other`, 1 = there, 2 = with its left neighbour, 3 = with its right, 4 = with both.

    The ends count as neighbours: a first token that is first in both has its left neighbour there.
    """
    known = set(other)
    padded = (-1, *other, -1)
    steps = set(pairwise(padded))
    mine = (-1, *ids, -1)
    found = []
    for place, token in enumerate(ids):
        if token not in known:
            found.append(0)
            continue
        found.append(1 + ((mine[place], token) in steps) + 2 * ((token, mine[place + 2]) in steps))
    return found
