"""Measures the bundled engine: against itself, against transformers, under hours of mixed load, with foreign tools."""

from engine.threads import before_torch

# Before anything here imports torch: what is compared waits as the engine's own process does, transformers included.
before_torch()
