"""The shapes of answers: whole JSON objects and server-sent events, as OpenAI's clients expect them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from engine.errors import RequestError
from engine.sampling import Choice

DONE = b"data: [DONE]\n\n"


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


def failure_body(message: str) -> dict[str, Any]:
    """The body of an error that is the engine's own fault."""
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "generation_failed"}}


def event(payload: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(payload) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(slots=True)
class Part:
    """Some text of one answer and the tokens it came from: a delta, or all of it."""

    index: int
    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0
    """Characters of this answer before `text`."""

    def following(self) -> Part:
        """The empty part after this one."""
        return Part(self.index, offset=self.offset + len(self.text))


class Shape:
    """Writes the answers of one request, for the endpoint it came in by."""

    def __init__(
        self,
        endpoint: Literal["chat", "completions"],
        model: str,
        *,
        logprobs: bool,
        include_usage: bool,
        token_text: Callable[[int], str],
    ) -> None:
        self._chat = endpoint == "chat"
        self._logprobs, self._include_usage, self._token_text = logprobs, include_usage, token_text
        prefix, self._object = ("chatcmpl-", "chat.completion") if self._chat else ("cmpl-", "text_completion")
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, parts: Sequence[Part], counts: dict[str, int]) -> dict[str, Any]:
        """The non-streamed answer."""
        return {
            **self._head,
            "object": self._object,
            "choices": [self._whole_choice(part) for part in parts],
            "usage": counts,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of an answer, which names the role; plain completions have none."""
        if not self._chat:
            return None
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None, None)])

    def delta(self, part: Part) -> dict[str, Any]:
        """A chunk with more text."""
        if self._chat:
            content = {"content": part.text}
            return self._chunk([self._delta(part.index, content, self._chat_logprobs(part), part.finish_reason)])
        return self._chunk([self._plain_choice(part)])

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The last chunk of an answer."""
        if self._chat:
            return self._chunk([self._delta(index, {}, None, reason)])
        return self._chunk([self._plain_choice(Part(index, finish_reason=reason))])

    def counted(self, counts: dict[str, int]) -> dict[str, Any] | None:
        """The chunk that only carries token counts, where the request asked for one."""
        return {**self._chunk([]), "usage": counts} if self._include_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = self._object + (".chunk" if self._chat else "")
        chunk = {**self._head, "object": kind, "choices": choices}
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _delta(self, index: int, delta: dict[str, str], logprobs: object, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _whole_choice(self, part: Part) -> dict[str, Any]:
        if not self._chat:
            return self._plain_choice(part)
        return {
            "index": part.index,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": self._chat_logprobs(part),
            "finish_reason": part.finish_reason,
        }

    def _plain_choice(self, part: Part) -> dict[str, Any]:
        return {
            "index": part.index,
            "text": part.text,
            "logprobs": self._plain_logprobs(part),
            "finish_reason": part.finish_reason,
        }

    def _chat_logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {**self._scored(c.token, c.logprob), "top_logprobs": [self._scored(*other) for other in c.alternatives]}
                for c in part.choices
            ],
            "refusal": None,
        }

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        # A token that is part of a character has no text of its own; the API allows null there.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _plain_logprobs(self, part: Part) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [self._token_text(c.token) for c in part.choices]
        lengths = [len(token) for token in tokens]
        return {
            "tokens": tokens,
            "token_logprobs": [c.logprob for c in part.choices],
            "top_logprobs": [{self._token_text(t): value for t, value in c.alternatives} for c in part.choices],
            "text_offset": [part.offset + sum(lengths[:i]) for i in range(len(tokens))],
        }
