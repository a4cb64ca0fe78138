"""Prompts with chunks among the others of a step: what is placed before each layer, and which tokens go on.

All chunks of a sequence are placed in the first step after its admission, each layer just before it is computed, so
that loading goes on beside computing. Where a chunk does not come, the step is of no use to that sequence, and is not
taken over for it: nothing of what it wrote is ever read, and it is computed like any other from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from engine.reuse.blending import Selector
from engine.reuse.chunks import BlendPrompt
from engine.sequence import Positions


class Source(Protocol):
    """Where the layers of a prompt's chunks come from. Called on the worker's thread."""

    def layer(self, index: int) -> Sequence[Tensor | None]:
        """[2, T, K, D] of each chunk of `BlendPrompt.placed`, whole and not turned, on any device; None: it is lost.

        May wait. Asked for 0, 1, … in turn, and from 0 on again where a step broke: whoever cannot says None.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Blended:
    """What an admitted sequence reuses."""

    prompt: BlendPrompt
    """Its whole prompt; what is placed before `Sequence.computed` is left out."""
    selector: Selector
    source: Source | None = None
    """None: the chunks have their layers."""

    def kept(self) -> Positions:
        """Those that `selector` says are not computed, before it has seen anything."""
        left = self.prompt.reused & ~self.selector.choose(self.prompt)
        return left.nonzero()[:, 0].numpy().astype(np.int64)
