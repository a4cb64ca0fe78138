"""What single entries have shown: an entry with evidence of its own moves the judge's probability for itself.

After vCache (arXiv 2502.03771, section 4), which learns a threshold per entry. Here the judge gives a probability
already, so an entry learns only by how much the judge's logit is off for it: one number with a Gaussian prior at 0,
updated by each label with one Newton step (assumed-density filtering of a logistic model with a known slope). What
comes out is only another score: the category's error budget is tested on it as on any other, so its guarantee stays.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_CLIP = 1e-6
"""Probabilities are kept this far from 0 and 1 before a logit is taken."""


@dataclass(frozen=True, slots=True)
class EntryRules:
    """How entries learn."""

    spread: float = 1.0
    """How far, as a standard deviation in logits, an entry is expected to be off."""
    enough: int = 3
    """Labels before an entry may raise its probability; it is lowered from the first on."""
    most: float = 3.0
    """Logits by which an entry may raise it at most; there is no bound on lowering."""
    entries: int = 8192
    """Entries that are remembered; the one not heard of for longest is forgotten first."""

    def __post_init__(self) -> None:
        if self.spread <= 0 or self.enough < 1 or self.most < 0 or self.entries < 1:
            raise ValueError("spread > 0, enough >= 1, most >= 0 and entries >= 1 must hold")


class EntryEvidence:
    """What was learnt of entries, by their ids; three numbers each."""

    def __init__(self, rules: EntryRules) -> None:
        self._rules = rules
        self._known: OrderedDict[int, tuple[float, float, int]] = OrderedDict()
        """Shift in logits, precision, labels; the least recent first."""

    def __len__(self) -> int:
        """Entries with evidence."""
        return len(self._known)

    def adjusted(self, entry: int, p: float) -> float:
        """The judge's probability for a candidate, moved by what its entry has shown."""
        known = self._known.get(entry)
        if known is None:
            return p
        shift, _, labels = known
        if shift > 0:
            shift = min(shift, self._rules.most) if labels >= self._rules.enough else 0.0
        return p if shift == 0.0 else _probability(_logit(p) + shift)

    def learn(self, entry: int, p: float, wrong: float) -> None:
        """Take a label (0 right, 1 wrong) of a candidate to which the judge itself gave `p`."""
        shift, precision, labels = self._known.pop(entry, (0.0, self._rules.spread**-2, 0))
        expected = _probability(_logit(p) + shift)
        precision += expected * (1.0 - expected)
        shift += (1.0 - wrong - expected) / precision
        self._known[entry] = (shift, precision, labels + 1)
        if len(self._known) > self._rules.entries:
            self._known.popitem(last=False)

    def forget(self, entry: int) -> None:
        """The entry is gone."""
        self._known.pop(entry, None)

    def plain(self) -> list[list[float]]:
        """The state in JSON's own types."""
        return [[entry, *known] for entry, known in self._known.items()]

    @classmethod
    def restored(cls, rules: EntryRules, plain: Sequence[Sequence[float]]) -> EntryEvidence:
        """Take a state up again. Raises ValueError when it is not one."""
        found = cls(rules)
        try:
            for entry, shift, precision, labels in plain:
                if not (math.isfinite(shift) and precision > 0):
                    raise ValueError("an entry's evidence is not finite")
                found._known[int(entry)] = (float(shift), float(precision), int(labels))
        except TypeError as error:
            raise ValueError(f"not the state of entries' evidence: {error}") from error
        while len(found._known) > rules.entries:
            found._known.popitem(last=False)
        return found


def _logit(p: float) -> float:
    p = min(1.0 - _CLIP, max(_CLIP, p))
    return math.log(p / (1.0 - p))


def _probability(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-40.0, min(40.0, logit))))
