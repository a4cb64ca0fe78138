"""Answers that must follow a grammar: JSON, a JSON schema, or the call of a tool. Built on llguidance.

A grammar is compiled once and kept; each answer gets a `Guide` of its own, which says before every token which ones may
come. Compiling happens where requests are read, off the event loop; the guide works on the runner's thread.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import orjson
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from engine.errors import RequestError
from engine.requests import ChatRequest
from engine.tokenizer import ChatTokenizer
from engine.tools import grammar

MAX_SCHEMA = 64 * 2**10
"""Bytes of JSON that the schemas of one request may have."""

KEPT = 2**20
"""Characters of rules whose compiled grammars are remembered; each takes up to a hundred times that in memory."""

_SPACES = r"( |\n[ \t]{0,32})?"
"""What may stand between two tokens of JSON: without a bound, a model could write spaces until its limit."""


class GuidanceError(Exception):
    """A grammar became too complex while it was followed, or a token was drawn that it does not allow."""


class Guide:
    """One answer's way through a grammar. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        """`words`: length of the bitmask."""
        self._matcher, self._words = matcher, words

    def mask(self) -> Tensor:
        """The tokens that may come next: int32 [ceil(V / 32)] on the CPU, token i is bit i % 32 of word i // 32.

        Where the grammar may end, the end tokens are among them; where it must, there is nothing else. A fresh tensor
        each time. Raises GuidanceError.
        """
        bits = torch.zeros(self._words, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * bits.element_size())
        self._check()
        return bits

    def advance(self, token: int) -> None:
        """Note the token drawn. Raises GuidanceError where it was not allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but an end token could follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GuidanceError(self._matcher.get_error().partition("\n")[0])


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher, self._words = matcher, words

    def guide(self) -> Guide:
        """A way through it from the beginning."""
        return Guide(self._matcher.deep_copy(), self._words)


class Guidance:
    """Compiles grammars for one checkpoint's vocabulary. May be used by several threads."""

    def __init__(
        self, tokenizer: ChatTokenizer, vocab_size: int, eos_ids: Collection[int], *, kept: int = KEPT
    ) -> None:
        """`kept`: characters of rules whose grammars are remembered."""
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._most_kept = kept
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def wanted(self, asked: ChatRequest) -> Grammar | None:
        """The grammar that an answer to this request must follow, if any.

        Raises RequestError, with the library's words where a schema is wrong, not supported or too complex.
        """
        if not asked.constrained:
            return None
        param = "tools" if asked.must_call else "response_format"
        _check_size([asked.schema_wanted, [function.parameters for function in asked.functions]], param=param)
        # Held while compiling: a burst of equal requests compiles once, and none can take every core.
        with self._lock:
            return self._compiled(self._rules(asked), param)

    def _rules(self, asked: ChatRequest) -> str:
        """Lark rules of which `start` is the answer."""
        answer = json_term(asked.schema_wanted or {})
        if asked.must_call:
            return f"start: calls\n{self._calls(asked)}"
        if asked.functions and self._tokenizer.tools is not None:
            return f"start: answer | calls\nanswer: {answer}\n{self._calls(asked)}"
        return f"start: {answer}"

    def _calls(self, asked: ChatRequest) -> str:
        if self._tokenizer.tools is None:
            raise RequestError(
                "tool_choice: it is not known how this model writes tool calls, so none can be required.",
                param="tool_choice",
                code="unsupported_parameter",
            )
        return grammar(
            self._tokenizer.tools,
            [(function.name, function.schema_wanted) for function in asked.functions],
            parallel=asked.several_calls,
            special=self._special_id,
            schema=json_term,
        )

    def _special_id(self, text: str) -> int | None:
        """The id by which rules must name a token: the library spells out ordinary ones only."""
        id_ = self._tokenizer.added_id(text)
        return id_ if id_ is not None and self._vocabulary.is_special_token(id_) else None

    def _compiled(self, rules: str, param: str) -> Grammar:
        if rules in self._kept:
            self._kept.move_to_end(rules)
            return self._kept[rules]
        matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(rules), log_level=0)
        if not matcher.is_error():
            # The first mask is the costly one, and what it finds is shared by all copies.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError(f"{param}: {_problem(matcher.get_error())}", param=param, code="invalid_schema")
        self._kept[rules] = Grammar(matcher, (self._vocab_size + 31) // 32)
        while len(self._kept) > 1 and sum(map(len, self._kept)) > self._most_kept:
            self._kept.popitem(last=False)
        return self._kept[rules]

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # Seconds for a large vocabulary: made when the first request needs it.
        problem: object = "it has no end token"
        if self._eos_ids:
            try:
                return LLTokenizer(self._tokenizer.serialized(), n_vocab=self._vocab_size, eos_token=self._eos_ids)
            except ValueError as error:
                problem = error
        raise RequestError(f"The answers of this model cannot be given a form: {problem}.", code="no_guidance")


def json_term(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a term of Lark rules."""
    options = {"whitespace_pattern": _SPACES}
    return f"%json {orjson.dumps({**schema, 'x-guidance': options}).decode()}"


def _check_size(schemas: object, *, param: str) -> None:
    """Refuse schemas that are too large to compile for everyone's sake. Raises RequestError."""
    try:
        size = len(orjson.dumps(schemas))
    except TypeError as error:
        raise RequestError(f"{param}: the schema cannot be read: {error}", param=param) from error
    if size > MAX_SCHEMA:
        raise RequestError(f"{param}: the schema has {size} bytes, at most {MAX_SCHEMA} are taken.", param=param)


def _problem(text: str) -> str:
    """The library's message without our own rules, which it quotes."""
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    return re.split(r"\n<state>|\n +\d+ \| ", text)[0].strip()[:500]
