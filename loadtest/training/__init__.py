"""Scripts that make the artefacts Hitpath ships: weights and tokenizers, from public data, with fixed seeds."""
