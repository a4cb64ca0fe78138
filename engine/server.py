"""HTTP in front of the runner: requests in, jobs out, events back as JSON or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, assert_never

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine import requests
from engine.answers import DONE, Part, Shape, error_body, event, failure_body, usage
from engine.checkpoint import Checkpoint
from engine.errors import ContextTooLong, ModelNotFound, QueueFull, RequestError
from engine.runner import Event, Failed, Finished, Job, Progress, Runner
from engine.sampling import SamplingParams

MAX_BODY = 16 * 2**20
Handler = Callable[[Request], Awaitable[Response]]


class BodyTooLarge(RequestError):
    """More bytes than any prompt that fits the context has."""

    status = 413


class Metrics:
    """What `/metrics` shows; one registry per engine, so that two in one process do not meet."""

    def __init__(self, runner: Runner) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hitpath_engine_requests",
            "Requests by endpoint and status.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.tokens = Counter("hitpath_engine_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.first = Histogram(
            "hitpath_engine_first_token_seconds", "Time from request to first token.", registry=self.registry
        )
        for position, name in enumerate(("running", "waiting")):
            gauge = Gauge(f"hitpath_engine_{name}", f"Answers that are {name}.", registry=self.registry)
            gauge.set_function(lambda position=position: runner.depth()[position])  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request: what to generate and how to write it down. `params` holds one entry per choice."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    shape: Shape
    stream: bool

    def prompt_tokens(self) -> int:
        """Counted once per prompt, however many answers it gets."""
        return sum(map(len, self.prompts))


class Generation:
    """The jobs of one request and their events, in the order they happen. Who starts it must cancel it in the end."""

    def __init__(self, runner: Runner, plan: Plan, metrics: Metrics) -> None:
        self._runner, self._metrics = runner, metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        pairs = [(prompt, params) for prompt in plan.prompts for params in plan.params]
        self._jobs = [Job(prompt, params, self._emitter(index)) for index, (prompt, params) in enumerate(pairs)]

    def __len__(self) -> int:
        return len(self._jobs)

    def start(self) -> None:
        """Queue the jobs. Raises QueueFull, ShuttingDown."""
        self._runner.submit(self._jobs)

    def cancel(self) -> None:
        """End what still runs; nothing happens to finished jobs."""
        self._runner.cancel(self._jobs)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Every event of every job, until all have finished or one has failed."""
        left, first = len(self._jobs), True
        while left:
            index, event = await self._events.get()
            if first:
                self._metrics.first.observe(time.monotonic() - self._began)
                first = False
            if isinstance(event, Finished):
                left -= 1
                self._metrics.tokens.labels("completion").inc(event.tokens)
            yield index, event
            if isinstance(event, Failed):
                return

    def _emitter(self, index: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            # The loop may be gone when the process stops; nobody waits for the event then.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return emit


class GenerationStream(StreamingResponse):
    """A stream of events; however it ends, finished or with the client gone, the jobs behind it end too."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


class Engine:
    """The application's state and its handlers."""

    def __init__(self, checkpoint: Checkpoint, runner: Runner, *, context: int) -> None:
        """`context`: most tokens of prompt and answer together."""
        self._checkpoint, self._runner, self._context = checkpoint, runner, context
        self._metrics = Metrics(runner)
        self._created = int(time.time())

    def application(self) -> Starlette:
        """The ASGI application; its lifespan owns the worker thread."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self._runner.start()
            yield
            await asyncio.to_thread(self._runner.close)

        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._counted("chat", self._chat), methods=["POST"]),
                Route("/v1/completions", self._counted("completions", self._completions), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/healthz", self._healthz),
                Route("/metrics", self._show_metrics),
            ],
            exception_handlers={HTTPException: _not_found, RequestError: _refused},
            lifespan=lifespan,
        )

    def _counted(self, endpoint: str, handler: Handler) -> Handler:
        async def counted(request: Request) -> Response:
            try:
                response = await handler(request)
            except RequestError as error:
                response = await _refused(request, error)
            except ClientDisconnect:
                response = Response(status_code=499)
            self._metrics.requests.labels(endpoint, str(response.status_code)).inc()
            return response

        return counted

    async def _chat(self, request: Request) -> Response:
        body = await _read(request)
        return await self._answer(request, await asyncio.to_thread(self._plan_chat, body))

    async def _completions(self, request: Request) -> Response:
        body = await _read(request)
        return await self._answer(request, await asyncio.to_thread(self._plan_completion, body))

    def _plan_chat(self, body: bytes) -> Plan:
        asked = requests.parse_chat(requests.parse_body(body))
        self._check_model(asked.model)
        tools = asked.tools if asked.tool_choice != "none" else None
        messages = [message.for_template() for message in asked.messages]
        prompt = self._checkpoint.tokenizer.encode_chat(messages, tools or None)
        return self._plan("chat", asked, [prompt], limit=asked.limit, logprobs=asked.alternatives, param="messages")

    def _plan_completion(self, body: bytes) -> Plan:
        asked = requests.parse_completion(requests.parse_body(body))
        self._check_model(asked.model)
        prompts = [self._prompt_ids(prompt) for prompt in asked.prompt]
        return self._plan("completions", asked, prompts, limit=asked.limit, logprobs=asked.logprobs, param="prompt")

    def _plan(
        self,
        endpoint: Literal["chat", "completions"],
        asked: requests.Sampled,
        prompts: list[list[int]],
        *,
        limit: int | None,
        logprobs: int | None,
        param: str,
    ) -> Plan:
        longest = max(map(len, prompts))
        if longest >= self._context:
            raise ContextTooLong(
                f"The context is {self._context} tokens; the prompt has {longest} and leaves no room to answer.",
                param=param,
            )
        if len(prompts) * asked.choices > requests.MAX_SEQUENCES:
            raise RequestError(f"At most {requests.MAX_SEQUENCES} answers (prompts times n) per request.", param="n")
        room = self._context - longest
        params = [
            asked.sampling(
                self._checkpoint.defaults,
                max_tokens=room if limit is None else min(limit, room),
                logprobs=logprobs,
                vocab_size=self._checkpoint.config.vocab_size,
                choice=choice,
            )
            for choice in range(asked.choices)
        ]
        shape = Shape(
            endpoint,
            self._checkpoint.name,
            logprobs=logprobs is not None,
            include_usage=asked.include_usage,
            token_text=self._checkpoint.tokenizer.token_text,
        )
        return Plan(prompts, params, shape, bool(asked.stream))

    def _check_model(self, asked: str | None) -> None:
        if asked not in (None, self._checkpoint.name):
            raise ModelNotFound(asked, self._checkpoint.name)

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        ids = self._checkpoint.tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("prompt: it has no tokens", param="prompt")
        if min(ids) < 0 or max(ids) >= self._checkpoint.config.vocab_size:
            raise RequestError(f"prompt: token ids are 0 to {self._checkpoint.config.vocab_size - 1}", param="prompt")
        return ids

    async def _answer(self, request: Request, plan: Plan) -> Response:
        generation = Generation(self._runner, plan, self._metrics)
        # Before the first byte of the response, so that a full queue is a plain 429 and not a broken stream.
        generation.start()
        self._metrics.tokens.labels("prompt").inc(plan.prompt_tokens())
        if plan.stream:
            return GenerationStream(generation, self._stream(generation, plan))
        return await self._whole(request, generation, plan)

    async def _whole(self, request: Request, generation: Generation, plan: Plan) -> Response:
        """Wait for everything, unless the client goes away."""
        gone = asyncio.ensure_future(_disconnected(request))
        collected = asyncio.ensure_future(self._collect(generation, plan))
        try:
            await asyncio.wait((gone, collected), return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                raise ClientDisconnect
            return collected.result()
        finally:
            generation.cancel()
            gone.cancel()
            collected.cancel()

    async def _collect(self, generation: Generation, plan: Plan) -> Response:
        parts = [Part(index) for index in range(len(generation))]
        tokens = 0
        async for index, happened in generation.events():
            match happened:
                case Progress(text, choice):
                    parts[index].text += text
                    parts[index].choices.append(choice)
                case Finished(reason, text, drawn):
                    parts[index].text += text
                    parts[index].finish_reason = reason
                    tokens += drawn
                case Failed(message):
                    return _json(failure_body(message), 500)
                case _ as never:
                    assert_never(never)
        return _json(plan.shape.whole(parts, usage(plan.prompt_tokens(), tokens)))

    async def _stream(self, generation: Generation, plan: Plan) -> AsyncIterator[bytes]:
        """Server-sent events."""
        shape, tokens = plan.shape, 0
        parts = [Part(index) for index in range(len(generation))]
        for part in parts:
            if (opening := shape.opening(part.index)) is not None:
                yield event(opening)
        async for index, happened in generation.events():
            part = parts[index]
            match happened:
                case Progress(text, choice):
                    part.text += text
                    part.choices.append(choice)
                    if text:
                        yield event(shape.delta(part))
                        parts[index] = part.following()
                case Finished(reason, text, drawn):
                    part.text += text
                    tokens += drawn
                    if part.text or part.choices:
                        yield event(shape.delta(part))
                    yield event(shape.closing(index, reason))
                case Failed(message):
                    yield event(failure_body(message), "error")
                    return
                case _ as never:
                    assert_never(never)
        if (counted := shape.counted(usage(plan.prompt_tokens(), tokens))) is not None:
            yield event(counted)
        yield DONE

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return _json(self._card())

    def _card(self) -> dict[str, object]:
        name = self._checkpoint.name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "hitpath",
            "max_model_len": self._context,
        }

    async def _healthz(self, _: Request) -> Response:
        return _json({"status": "ok", "model": self._checkpoint.name})

    async def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _read(request: Request) -> bytes:
    """The body, as far as it may be. Raises BodyTooLarge."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise BodyTooLarge(f"The body is larger than {MAX_BODY} bytes.", code="body_too_large")
        chunks.append(chunk)
    return b"".join(chunks)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"retry-after": "1"} if isinstance(error, QueueFull) else None
    return _json(error_body(error), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = RequestError(f"{request.method} {request.url.path}: {error.detail}", code="unknown_url")
    return _json(error_body(refusal), error.status_code, dict(error.headers or {}))


def room(checkpoint: Checkpoint, kv_memory: int) -> int:
    """Tokens whose keys and values fit `kv_memory` bytes."""
    config = checkpoint.config
    return kv_memory // (config.layers * 2 * config.kv_heads * config.head_dim * checkpoint.dtype.itemsize)
