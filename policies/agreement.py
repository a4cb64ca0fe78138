"""Whether two answers to one question say the same: first by their words, then by their similarity."""

from __future__ import annotations

import re

from policies.sharing import agree, gist

SAME = 0.92
"""Cosine of two answers from which they say the same, if their figures do not differ."""
DIFFERENT = 0.5
"""Cosine below which they do not."""
_BRIEF = 40
"""Words up to which each figure of an answer counts: longer ones have figures that are no part of the point."""
_FIGURE = re.compile(r"\d[\d.,:]*")


def by_words(stored: str, fresh: str) -> float | None:
    """How wrong the stored answer is as far as words alone tell: 0 if it says the same, None if they do not tell.

    Two empty answers tell nothing.
    """
    return 0.0 if agree(gist(stored), gist(fresh)) else None


def by_similarity(stored: str, fresh: str, cosine: float) -> float | None:
    """The same from the answers' cosine: 0 or 1 where it is clear, None where somebody else must judge."""
    if cosine < DIFFERENT:
        return 1.0
    if cosine >= SAME and not _figures_differ(stored, fresh):
        return 0.0
    return None


def between(stored: str, fresh: str, cosine: float) -> float:
    """The best guess where nobody else can judge: straight from the one bound to the other, at least a half where
    figures differ.
    """
    guess = min(1.0, max(0.0, (SAME - cosine) / (SAME - DIFFERENT)))
    return max(0.5, guess) if _figures_differ(stored, fresh) else guess


def brief(stored: str, fresh: str) -> bool:
    """Whether both answers are so short that every figure and name in them is part of the point."""
    return len(stored.split()) <= _BRIEF and len(fresh.split()) <= _BRIEF


def _figures_differ(stored: str, fresh: str) -> bool:
    return brief(stored, fresh) and _figures(stored) != _figures(fresh)


def _figures(text: str) -> list[str]:
    return sorted(figure.rstrip(".,:") for figure in _FIGURE.findall(text))
