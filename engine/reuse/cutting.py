"""Prompts as tokens, and where in them their clients marked texts of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.reuse.finding import Marks, Span, marked_spans, text_parts, token_spans
from engine.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Cut:
    """A prompt's token ids, and the tokens of each marked text, from the first to behind the last."""

    ids: list[int]
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts prompts at the marks; texts of fewer than `least` tokens are not worth it."""

    tokenizer: ChatTokenizer
    marks: Marks
    least: int

    def chat(self, contents: Sequence[Mapping[str, object]], messages: Sequence[Mapping[str, Any]], tools: Any) -> Cut:
        """`contents` are the messages as they came, with their parts; `messages` as the template takes them.

        A token belongs to a text only if all of it does: what stands beside it may have grown into one token with its
        first or last letters.
        """
        rendered = self.tokenizer.render(messages, tools)
        ids, offsets = self.tokenizer.encode_rendered(rendered)
        return Cut(ids, token_spans(offsets, marked_spans(rendered, text_parts(contents), self.marks), self.least))

    def text(self, text: str) -> Cut:
        """A bare prompt."""
        ids, offsets = self.tokenizer.encode_offsets(text)
        return Cut(ids, token_spans(offsets, self.marks.cut(text), self.least))
