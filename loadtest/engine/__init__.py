"""Measures the bundled engine: against itself, against transformers, under hours of mixed load, with foreign tools."""

import os

# Before anything here imports torch: what is compared waits as the engine's own process does, transformers included.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
