"""Everything that measures: benchmarks, trace replay, answer quality."""
