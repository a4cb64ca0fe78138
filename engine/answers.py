"""The shapes of answers: whole JSON objects and server-sent events, as OpenAI's clients expect them.

Plain code over the events of the runner. A token of a whole answer costs a list entry; a streamed one, where only its
text is wanted, one string encoded between two prepared pieces of bytes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

import orjson

from engine.errors import RequestError
from engine.runner import Event, Failed, Finished, Progress, Prompted
from engine.sampling import Choice
from engine.sequence import NO_CHUNKS, TIERS
from engine.tools import Call, CallScanner, Piece, ToolFormat

DONE = b"data: [DONE]\n\n"

_HOLE = "\x00"
"""Stands in a prepared event where its text will be."""


def error_body(error: RequestError) -> dict[str, Any]:
    """The body of a refusal."""
    kind = {404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
    return {
        "error": {
            "message": error.message,
            "type": kind.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
    }


def failure_body(failed: Failed) -> dict[str, Any]:
    """The body of an error that is the engine's own fault."""
    return {"error": {"message": failed.message, "type": "server_error", "param": None, "code": failed.code}}


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(payload) + b"\n\n"


@dataclass(slots=True)
class Usage:
    """Token counts of one request."""

    prompt: int
    """Counted once per prompt, however many answers it gets."""
    cached: int = 0
    completion: int = 0
    prefix: int = 0
    """Of those cached, the tokens known to stand exactly so at the beginning; chunks brought the others."""
    chunks: int = 0
    recomputed: int = 0
    """Tokens of chunks that were computed again."""
    tier: str = NO_CHUNKS.tier
    """The slowest one that a chunk came from."""

    def prompted(self, event: Prompted) -> None:
        """Count a prompt that was computed."""
        self.cached += event.cached + event.kept
        self.prefix += event.cached
        self.chunks += event.used.chunks
        self.recomputed += event.used.recomputed
        self.tier = max(self.tier, event.used.tier, key=TIERS.index)

    def reuse(self) -> str:
        """What was not computed of the prompts so far, as the header `x-hitpath-kv` has it."""
        return f"prefix={self.prefix}; chunks={self.chunks}; recomputed={self.recomputed}; tier={self.tier}"

    def shown(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is given back before its answer."""

    text: str
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Tools:
    """How calls are found in an answer."""

    form: ToolFormat
    names: frozenset[str]
    parallel: bool

    def scanner(self) -> CallScanner:
        """For one answer."""
        return CallScanner(self.form, self.names, parallel=self.parallel)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What log probabilities need to know of tokens."""

    spelled: Callable[[int], tuple[str, bytes | None]]
    """A token's text and, where known, its bytes."""
    silent: Callable[[int], bool]
    """Whether it never appears in a text."""


@dataclass(slots=True)
class Scored:
    """Tokens with their log probabilities, and where their text begins in the answer's."""

    choices: list[Choice] = field(default_factory=list)
    offset: int = 0


class Shape:
    """Writes the answers of one request, for the endpoint it came in by."""

    def __init__(
        self,
        endpoint: Literal["chat", "completions"],
        model: str,
        *,
        logprobs: bool,
        include_usage: bool,
        vocabulary: Vocabulary,
        tools: Tools | None = None,
        echoes: Sequence[Echo] | None = None,
    ) -> None:
        """`echoes`: one per answer, in order, where prompts are given back."""
        self._chat = endpoint == "chat"
        self.logprobs, self._include_usage, self._vocabulary = logprobs, include_usage, vocabulary
        self.tools, self.echoes = tools, echoes
        prefix, self._object = ("chatcmpl-", "chat.completion") if self._chat else ("cmpl-", "text_completion")
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> bytes:
        """The non-streamed answer."""
        return orjson.dumps({**self._head, "object": self._object, "choices": choices, "usage": usage.shown()})

    def choice(self, index: int, pieces: Sequence[Piece], scored: Scored, reason: str) -> dict[str, Any]:
        """One choice of it."""
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        if not self._chat:
            return self._plain(index, text, scored, reason)
        calls = [piece for piece in pieces if isinstance(piece, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [self._call(call) for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": self._chat_logprobs(scored),
            "finish_reason": reason,
        }

    def opening(self, index: int) -> bytes:
        """The first chunk of a streamed answer, which names the role; plain completions have none."""
        if not self._chat:
            return b""
        return self._delta(index, {"role": "assistant", "content": ""})

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON text in a chunk that has nothing else of its own."""
        before, _, after = self.text(index, _HOLE, Scored()).rpartition(orjson.dumps(_HOLE))
        return before, after

    def text(self, index: int, text: str, scored: Scored) -> bytes:
        """A chunk with more text, or with no more than the log probabilities of tokens that have none."""
        if self._chat:
            return self._delta(index, {"content": text}, self._chat_logprobs(scored))
        return self._event([self._plain(index, text, scored, None)])

    def call(self, index: int, number: int, call: Call) -> bytes:
        """The chunks of the tool call with this number: the function, then its arguments."""
        shown = self._call(call)
        named = {**shown, "function": {"name": call.name, "arguments": ""}}
        return b"".join(
            self._delta(index, {"tool_calls": [{"index": number, **part}]})
            for part in (named, {"function": {"arguments": call.arguments}})
        )

    def closing(self, index: int, reason: str) -> bytes:
        """The last chunk of an answer."""
        if self._chat:
            return self._delta(index, {}, reason=reason)
        return self._event([{"index": index, "text": "", "logprobs": None, "finish_reason": reason}])

    def counted(self, usage: Usage) -> bytes:
        """The chunk that only carries token counts, where the request asked for one."""
        return event({**self._chunk([]), "usage": usage.shown()}) if self._include_usage else b""

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        return event(self._chunk(choices))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = self._object + (".chunk" if self._chat else "")
        chunk = {**self._head, "object": kind, "choices": choices}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _delta(self, index: int, delta: dict[str, Any], logprobs: object = None, reason: str | None = None) -> bytes:
        return self._event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _plain(self, index: int, text: str, scored: Scored, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._plain_logprobs(scored), "finish_reason": reason}

    def _call(self, call: Call) -> dict[str, Any]:
        assert self.tools is not None
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": self.tools.form.new_id(), "type": "function", "function": function}

    def _chat_logprobs(self, scored: Scored) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                {
                    **self._spelled(choice.token, choice.logprob),
                    "top_logprobs": [self._spelled(*other) for other in choice.alternatives],
                }
                for choice in scored.choices
            ],
            "refusal": None,
        }

    def _spelled(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, data = self._vocabulary.spelled(token)
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

    def _plain_logprobs(self, scored: Scored) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets, at = [], scored.offset
        for choice in scored.choices:
            offsets.append(at)
            at += self.width(choice.token)
        return {
            "tokens": [self._text(choice.token) for choice in scored.choices],
            "token_logprobs": [choice.logprob for choice in scored.choices],
            # The first token of a prompt follows nothing, so nothing is known of it.
            "top_logprobs": [
                None if choice.logprob is None else {self._text(t): value for t, value in choice.alternatives}
                for choice in scored.choices
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._vocabulary.spelled(token)[0]

    def width(self, token: int) -> int:
        """Characters of a token in the answer's text."""
        return 0 if self._vocabulary.silent(token) else len(self._text(token))


def _echoed(echo: Echo, prompted: Prompted) -> list[Choice]:
    """The prompt's tokens; the first has no log probability."""
    return [choice or Choice(token) for token, choice in zip(echo.tokens, prompted.choices, strict=True)]


def _finish(reason: str, calls: int) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


class WholeAnswer:
    """Collects the events of a request into one answer."""

    def __init__(self, shape: Shape, usage: Usage, answers: int, per_prompt: int) -> None:
        """`per_prompt`: answers each prompt gets; `answers` in all."""
        self._shape, self._usage, self._per_prompt = shape, usage, per_prompt
        echoes = shape.echoes
        self._texts: list[list[str]] = [[] if echoes is None else [echoes[i].text] for i in range(answers)]
        self._scored = [Scored() for _ in range(answers)]
        self._reasons = [""] * answers

    def add(self, index: int, event: Event) -> Failed | None:
        """Take one event; an answer of which a part failed is no answer."""
        match event:
            case Progress(text, choice):
                if text:
                    self._texts[index].append(text)
                if self._shape.logprobs:
                    self._scored[index].choices.append(choice)
            case Prompted():
                if index % self._per_prompt == 0:
                    self._usage.prompted(event)
                if self._shape.echoes is not None and self._shape.logprobs:
                    self._scored[index].choices += _echoed(self._shape.echoes[index], event)
            case Finished(reason, text, tokens):
                self._texts[index].append(text)
                self._reasons[index] = reason
                self._usage.completion += tokens
            case Failed():
                return event
            case _ as never:
                assert_never(never)
        return None

    def body(self) -> bytes:
        """The JSON of it, once every answer has finished."""
        return self._shape.whole([self._choice(index) for index in range(len(self._texts))], self._usage)

    def _choice(self, index: int) -> dict[str, Any]:
        pieces: list[Piece] = ["".join(self._texts[index])]
        calls = 0
        if self._shape.tools is not None:
            scanner = self._shape.tools.scanner()
            pieces = [piece for text in pieces if isinstance(text, str) for piece in scanner.push(text)]
            pieces += scanner.flush()
            calls = scanner.calls
        return self._shape.choice(index, pieces, self._scored[index], _finish(self._reasons[index], calls))


class _Told:
    """One streamed answer: what has been sent of it."""

    def __init__(self, shape: Shape, index: int) -> None:
        self._shape, self._index = shape, index
        self._scanner = None if shape.tools is None else shape.tools.scanner()
        self._around = None if shape.logprobs else shape.around_text(index)
        self._scored = Scored()
        self._calls = 0

    def prompted(self, prompted: Prompted) -> bytes:
        """The prompt, where it is given back."""
        if self._shape.echoes is None:
            return b""
        echo = self._shape.echoes[self._index]
        if self._shape.logprobs:
            self._scored.choices += _echoed(echo, prompted)
        return self._text(echo.text)

    def progress(self, text: str, choice: Choice) -> bytes:
        """One more token."""
        if self._shape.logprobs:
            self._scored.choices.append(choice)
        if self._scanner is not None:
            return self._pieces(self._scanner.push(text))
        return self._text(text) if text else b""

    def finished(self, reason: str, text: str) -> bytes:
        """The rest and the end."""
        if self._scanner is None:
            rest = self._text(text) if text else b""
        else:
            rest = self._pieces([*self._scanner.push(text), *self._scanner.flush()])
        if self._scored.choices:
            rest += self._text("")
        return rest + self._shape.closing(self._index, _finish(reason, self._calls))

    def _pieces(self, pieces: Sequence[Piece]) -> bytes:
        sent = b""
        for piece in pieces:
            if isinstance(piece, str):
                sent += self._text(piece)
            else:
                sent += self._shape.call(self._index, self._calls, piece)
                self._calls += 1
        return sent

    def _text(self, text: str) -> bytes:
        if self._around is not None:
            return self._around[0] + orjson.dumps(text) + self._around[1]
        scored = self._scored
        self._scored = Scored(offset=scored.offset + sum(self._shape.width(choice.token) for choice in scored.choices))
        return self._shape.text(self._index, text, scored)


class StreamedAnswer:
    """Turns the events of a request into server-sent events."""

    def __init__(self, shape: Shape, usage: Usage, answers: int, per_prompt: int) -> None:
        """`per_prompt`: answers each prompt gets; `answers` in all."""
        self._shape, self._usage, self._per_prompt = shape, usage, per_prompt
        self._told = [_Told(shape, index) for index in range(answers)]

    def opening(self) -> bytes:
        """What can be sent before anything has happened."""
        return b"".join(self._shape.opening(index) for index in range(len(self._told)))

    def add(self, index: int, happened: Event) -> bytes:
        """What one event adds to the stream; nothing may follow a failure."""
        told = self._told[index]
        match happened:
            case Progress(text, choice):
                return told.progress(text, choice)
            case Prompted():
                if index % self._per_prompt == 0:
                    self._usage.prompted(happened)
                return told.prompted(happened)
            case Finished(reason, text, tokens):
                self._usage.completion += tokens
                return told.finished(reason, text)
            case Failed():
                return event(failure_body(happened), "error")
            case _ as never:
                assert_never(never)

    def closing(self) -> bytes:
        """The end, when every answer has finished."""
        return self._shape.counted(self._usage) + DONE
