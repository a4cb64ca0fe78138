"""How numbers are computed in training on this machine."""

from __future__ import annotations

import torch

from engine.checkpoint import computes_bfloat16


def autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies it; elsewhere float32, since emulating it takes several times as long."""
    return torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16())
