"""The tokenizer of the pair model, with a memory: an epoch asks for the same texts again."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from gateway.judge.pairs import TEXT_TOKENS


class Tokens:
    """Token ids of a text without markers; longer texts are cut, which only training does."""

    def __init__(self, path: Path) -> None:
        """Load the embedder's tokenizer file."""
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._known: dict[str, list[int]] = {}
        self.start, self.end = self._tokenizer.encode("").ids

    def __call__(self, text: str) -> list[int]:
        """The ids, at most TEXT_TOKENS."""
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids[:TEXT_TOKENS]
        return self._known[text]
