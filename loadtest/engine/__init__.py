"""Measures the bundled engine: against itself, against transformers, under hours of mixed load, with foreign tools."""
