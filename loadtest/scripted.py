"""A scripted OpenAI-compatible backend: deterministic answers, no model, as fast as one process can be.

It is the ceiling that the benches measure against and the backend of the tests. Every answer names the question it
answers (`answer_text`), so that a wrong answer shows.

    python -m loadtest.scripted --port 9000 --tokens 300 --latency 50 --token-interval 5
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
import uvicorn
from numpy.typing import NDArray

CREATED = 1_700_000_000
MODEL = "scripted-1"
DIMENSIONS = 384

JSON_TYPE = "application/json"
STREAM_TYPE = "text/event-stream; charset=utf-8"
_DONE = b"data: [DONE]\n\n"
_MODELS = orjson.dumps(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": CREATED, "owned_by": "hitpath"}]}
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the answers are and how fast they come."""

    tokens: int = 16
    latency: float = 0.0
    """Seconds before the first byte."""
    interval: float = 0.0
    """Seconds between the events of a stream."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: a single part for JSON, one part per event for a stream."""

    status: int
    content_type: str
    parts: list[bytes]


@dataclass(frozen=True, slots=True)
class _Generation:
    """What the model "said"."""

    id: str
    model: str
    words: list[str]
    finish: str
    prompt_tokens: int

    @property
    def text(self) -> str:
        return "".join(self.words)


def answer_text(model: str, text: str, tokens: int = 16) -> str:
    """Give what this backend says to a last user text (or a prompt): a fingerprint of it, then filler."""
    return "".join(_words(model, text, tokens))


def respond(path: str, body: bytes, pace: Pace) -> Answer:
    """Answer one request to `path`; never raises, whatever the body is."""
    if path.endswith("/models"):
        return Answer(200, JSON_TYPE, [_MODELS])
    if path == "/healthz":
        return Answer(200, JSON_TYPE, [b"{}"])
    speak = next((speak for end, speak in _SPEAKERS.items() if path.endswith(end)), None)
    if speak is None:
        return _error(404, f"no such path: {path}")
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _error(400, "the body is not JSON")
    if not isinstance(asked, dict):
        return _error(400, "the body is not an object")
    try:
        return speak(asked, pace)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return _error(400, f"the request makes no sense: {error!r}")


def _error(status: int, message: str) -> Answer:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Answer(status, JSON_TYPE, [orjson.dumps({"error": error})])


def _words(model: str, text: str, tokens: int) -> list[str]:
    mark = hashlib.blake2b(f"{model}\0{text}".encode(errors="replace"), digest_size=6).hexdigest()
    return [f"answer-{mark}", *_filler(tokens - 1)]


@lru_cache(maxsize=64)
def _filler(count: int) -> list[str]:
    return [f" word{number}" for number in range(count)]


def _generate(prefix: str, asked: dict[str, Any], text: str, pace: Pace) -> _Generation:
    model = str(asked.get("model", MODEL))
    limits = (asked.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    limit = next((limit for limit in limits if isinstance(limit, int)), pace.tokens)
    words = _words(model, text, pace.tokens)[: max(1, limit)]
    finish = "stop" if len(words) == pace.tokens else "length"
    return _Generation(f"{prefix}-{words[0][7:]}", model, words, finish, len(text.split()) or 1)


def _said(content: Any) -> str:
    """Give the text of a message's content, which is a string or a list of parts."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _last_user_text(messages: Any) -> str:
    if not isinstance(messages, list):
        return _said(messages)
    users = (m for m in reversed(messages) if isinstance(m, dict) and m.get("role") == "user")
    return _said(next(users, {}).get("content"))


def _wants_usage(asked: dict[str, Any]) -> bool:
    options = asked.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _count(asked: dict[str, Any]) -> int:
    return asked["n"] if isinstance(asked.get("n"), int) and asked["n"] > 0 else 1


def _usage(said: _Generation, choices: int) -> dict[str, int]:
    completion = len(said.words) * choices
    return {
        "prompt_tokens": said.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": said.prompt_tokens + completion,
    }


def _event(payload: dict[str, Any], name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, orjson.dumps(payload))


class _Chunks:
    """Writes chunks that differ only in their choice, the common part once."""

    def __init__(self, envelope: dict[str, Any]) -> None:
        self._head = b"data: " + orjson.dumps(envelope)[:-1] + b',"choices":['

    def choice(self, choice: dict[str, Any]) -> bytes:
        return b"%b%b]}\n\n" % (self._head, orjson.dumps(choice))

    def texts(self, choice: dict[str, Any], words: list[str]) -> list[bytes]:
        """Write one chunk per word, in the place where `choice` has an empty string."""
        before, after = (self._head + orjson.dumps(choice) + b"]}\n\n").rsplit(b'""', 1)
        return [b"%b%b%b" % (before, orjson.dumps(word), after) for word in words]

    def end(self, usage: dict[str, int] | None) -> list[bytes]:
        return [_DONE] if usage is None else [b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage)), _DONE]


def _chat(asked: dict[str, Any], pace: Pace) -> Answer:
    if not asked.get("messages"):
        return _error(400, "messages is required")
    said = _generate("chatcmpl", asked, _last_user_text(asked["messages"]), pace)
    count = _count(asked)
    call = _tool_call(asked, said)
    finish = said.finish if call is None else "tool_calls"
    if asked.get("stream"):
        return Answer(200, STREAM_TYPE, _chat_stream(asked, said, call, finish, count))
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    if call is not None:
        message |= {"content": None, "tool_calls": [call]}
    choices: list[dict[str, Any]] = [
        {"index": index, "message": message, "logprobs": _logprobs(asked, said.words), "finish_reason": finish}
        for index in range(count)
    ]
    body = {**_envelope(said, "chat.completion"), "choices": choices, "usage": _usage(said, count)}
    return Answer(200, JSON_TYPE, [orjson.dumps(body)])


def _chat_stream(
    asked: dict[str, Any], said: _Generation, call: dict[str, Any] | None, finish: str, count: int
) -> list[bytes]:
    chunks = _Chunks(_envelope(said, "chat.completion.chunk"))
    parts: list[bytes] = []
    for index in range(count):
        blank = {"index": index, "logprobs": None, "finish_reason": None}
        head = {"role": "assistant", "content": "" if call is None else None, "refusal": None}
        parts.append(chunks.choice({**blank, "delta": head}))
        if call is not None:
            parts += [chunks.choice({**blank, "delta": {"tool_calls": [piece]}}) for piece in _call_pieces(call)]
        elif asked.get("logprobs"):
            parts += [
                chunks.choice({**blank, "delta": {"content": word}, "logprobs": _logprobs(asked, [word])})
                for word in said.words
            ]
        else:
            parts += chunks.texts({**blank, "delta": {"content": ""}}, said.words)
        parts.append(chunks.choice({**blank, "delta": {}, "finish_reason": finish}))
    return parts + chunks.end(_usage(said, count) if _wants_usage(asked) else None)


def _envelope(said: _Generation, kind: str) -> dict[str, Any]:
    return {
        "id": said.id,
        "object": kind,
        "created": CREATED,
        "model": said.model,
        "system_fingerprint": "fp_scripted",
    }


def _logprobs(asked: dict[str, Any], words: list[str]) -> dict[str, Any] | None:
    if not asked.get("logprobs"):
        return None
    content = [{"token": word, "logprob": -0.5, "bytes": list(word.encode()), "top_logprobs": []} for word in words]
    return {"content": content, "refusal": None}


def _tool_call(asked: dict[str, Any], said: _Generation) -> dict[str, Any] | None:
    """Call a function where the request insists on one: the named one, or the first."""
    choice, tools = asked.get("tool_choice"), asked.get("tools")
    if isinstance(choice, dict):
        name = choice["function"]["name"]
    elif choice == "required" and tools:
        name = tools[0]["function"]["name"]
    else:
        return None
    arguments = orjson.dumps({"echo": said.words[0]}).decode()
    return {"id": f"call_{said.words[0][7:]}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_pieces(call: dict[str, Any]) -> list[dict[str, Any]]:
    arguments = call["function"]["arguments"]
    head = {"index": 0, **call, "function": {"name": call["function"]["name"], "arguments": ""}}
    cut = [arguments[at : at + 8] for at in range(0, len(arguments), 8)]
    return [head, *({"index": 0, "function": {"arguments": piece}} for piece in cut)]


def _completions(asked: dict[str, Any], pace: Pace) -> Answer:
    prompt = asked.get("prompt")
    if prompt is None:
        return _error(400, "prompt is required")
    text = prompt if isinstance(prompt, str) else orjson.dumps(prompt).decode()
    said, count = _generate("cmpl", asked, text, pace), _count(asked)
    envelope = {"id": said.id, "object": "text_completion", "created": CREATED, "model": said.model}
    if asked.get("stream"):
        chunks, parts = _Chunks(envelope), list[bytes]()
        for index in range(count):
            blank = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
            parts += [*chunks.texts(blank, said.words), chunks.choice({**blank, "finish_reason": said.finish})]
        parts += chunks.end(_usage(said, count) if _wants_usage(asked) else None)
        return Answer(200, STREAM_TYPE, parts)
    choices = [
        {"index": index, "text": said.text, "logprobs": None, "finish_reason": said.finish} for index in range(count)
    ]
    return Answer(200, JSON_TYPE, [orjson.dumps({**envelope, "choices": choices, "usage": _usage(said, count)})])


def vector(text: str, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """Give a text's unit vector, shape [dimensions]: the sum of one random vector per word, so that texts that share
    words are near."""
    summed = np.sum([_word_vector(word, dimensions) for word in text.lower().split() or [""]], axis=0)
    return np.asarray(summed / np.linalg.norm(summed), dtype=np.float32)


@lru_cache(maxsize=16384)
def _word_vector(word: str, dimensions: int) -> NDArray[np.float32]:
    seed = zlib.crc32(word.encode(errors="replace"))
    return np.random.default_rng(seed).standard_normal(dimensions, dtype=np.float32)


def _embeddings(asked: dict[str, Any], pace: Pace) -> Answer:
    given = asked.get("input")
    if not given:
        return _error(400, "input is required")
    alone = isinstance(given, str) or isinstance(given[0], int)
    texts = [item if isinstance(item, str) else " ".join(map(str, item)) for item in ([given] if alone else given)]
    vectors = [vector(text, asked.get("dimensions") or DIMENSIONS) for text in texts]
    as_text = asked.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if as_text else row.tolist(),
        }
        for index, row in enumerate(vectors)
    ]
    tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": asked.get("model", MODEL), "usage": usage}
    return Answer(200, JSON_TYPE, [orjson.dumps(body)])


def _responses(asked: dict[str, Any], pace: Pace) -> Answer:
    if not asked.get("input"):
        return _error(400, "input is required")
    said = _generate("resp", asked, _last_user_text(asked["input"]), pace)
    done = said.finish == "stop"
    part = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
    status = "completed" if done else "incomplete"
    item = {"id": f"msg_{said.id[5:]}", "type": "message", "status": status, "role": "assistant", "content": [part]}
    usage = {
        "input_tokens": said.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(said.words),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": said.prompt_tokens + len(said.words),
    }
    response: dict[str, Any] = {
        "id": said.id,
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": None if done else {"reason": "max_output_tokens"},
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata") or {},
        "model": said.model,
        "output": [item],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": usage,
    }
    if not asked.get("stream"):
        return Answer(200, JSON_TYPE, [orjson.dumps(response)])
    return Answer(200, STREAM_TYPE, _response_events(response, item, part, said.words))


def _response_events(
    response: dict[str, Any], item: dict[str, Any], part: dict[str, Any], words: list[str]
) -> list[bytes]:
    begun = {**response, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    opened = {**item, "status": "in_progress", "content": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": opened},
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        *({"type": "response.output_text.delta", **place, "delta": word, "logprobs": []} for word in words),
        {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": f"response.{response['status']}", "response": response},
    ]
    return [_event({**event, "sequence_number": number}, event["type"]) for number, event in enumerate(events)]


_SPEAKERS: dict[str, Callable[[dict[str, Any], Pace], Answer]] = {
    "/chat/completions": _chat,
    "/completions": _completions,
    "/embeddings": _embeddings,
    "/responses": _responses,
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ScriptedBackend:
    """The ASGI application; a framework's routing would be most of its time."""

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        body = await _read(receive)
        answer = respond(scope["path"], body, self._pace)
        if self._pace.latency:
            await asyncio.sleep(self._pace.latency)
        headers = [(b"content-type", answer.content_type.encode())]
        if answer.content_type == JSON_TYPE:
            headers.append((b"content-length", b"%d" % len(answer.parts[0])))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if self._pace.interval and len(answer.parts) > 1:
            for part in answer.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(self._pace.interval)
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "http.response.body", "body": b"".join(answer.parts)})


async def _read(receive: Receive) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts = [message["body"]]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.scripted", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int)
    where.add_argument("--uds", metavar="PATH")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--tokens", type=int, default=16, help="words of an answer")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="before the first byte")
    parser.add_argument("--token-interval", type=float, default=0.0, metavar="MS", help="between a stream's events")
    options = parser.parse_args(arguments)
    pace = Pace(options.tokens, options.latency / 1000, options.token_interval / 1000)
    uvicorn.run(
        ScriptedBackend(pace),
        host=options.host,
        port=options.port or 0,
        uds=options.uds,
        lifespan="off",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
