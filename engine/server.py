"""HTTP in front of the runner: requests in, jobs out, events back as JSON or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine import requests
from engine.answers import Echo, Shape, StreamedAnswer, Tools, Usage, Vocabulary, WholeAnswer, error_body, failure_body
from engine.checkpoint import Checkpoint
from engine.errors import ContextTooLong, ModelNotFound, QueueFull, RequestError
from engine.guidance import Grammar, Guidance
from engine.metrics import EngineMetrics
from engine.reuse.cutting import Cut, Cutter
from engine.runner import Event, Failed, Finished, Happened, Job
from engine.sampling import SamplingParams

MAX_BODY = 16 * 2**20
KV_HEADER = "x-hitpath-kv"
"""Of a request: how much may be reused; of an answer: what was."""
EXACT = "exact"
Handler = Callable[[Request], Awaitable[Response]]


class BodyTooLarge(RequestError):
    """More bytes than any prompt that fits the context has."""

    status = 413


class Worker(Protocol):
    """Who computes: the runner, seen from here."""

    def start(self) -> None:
        """Begin to work."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all jobs or none. Raises QueueFull, ShuttingDown."""
        ...

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End them; finished ones are left alone."""
        ...

    def depth(self) -> tuple[int, int]:
        """How many are running and how many wait."""
        ...

    def close(self) -> None:
        """End; returns when nothing is computed any more."""
        ...


class Delivery:
    """Carries what happened from the worker's thread to the jobs' owners on the event loop, a step at a time."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Deliver to the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def __call__(self, happened: Happened) -> None:
        """Hand these over; called on the worker's thread."""
        # The loop may be gone when the process stops; nobody waits for the events then.
        if happened and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hand_out, happened)

    @staticmethod
    def _hand_out(happened: Happened) -> None:
        for job, event in happened:
            job.emit(event)


class Pace:
    """How fast answers have been finished lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=64)

    def finished(self) -> None:
        """One more answer has ended."""
        self._ends.append(self._clock())

    def retry_after(self, waiting: int) -> int:
        """Whole seconds until a queue of this length will have been worked off; at least 1, at most a minute."""
        if len(self._ends) < 2:
            return 1
        seconds_each = (self._clock() - self._ends[0]) / (len(self._ends) - 1)
        return min(60, max(1, math.ceil(waiting * seconds_each)))


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request: what to generate and how to write it down. `params` holds one entry per choice."""

    prompts: list[Cut]
    params: list[SamplingParams]
    shape: Shape
    stream: bool
    tenant: str
    grammar: Grammar | None
    score_prompts: bool
    exact: bool
    """Nothing may be reused but what was computed in exactly this place."""

    @property
    def answers(self) -> int:
        """Prompts times choices."""
        return len(self.prompts) * len(self.params)

    def usage(self) -> Usage:
        """Token counts before anything was generated."""
        return Usage(sum(len(prompt.ids) for prompt in self.prompts))

    def jobs(self, put: Callable[[int, Event], None]) -> list[Job]:
        """One per answer: all choices of the first prompt, then those of the second; `put` takes index and event."""
        jobs: list[Job] = []
        for prompt in self.prompts:
            first: Job | None = None
            for params in self.params:
                job = Job(
                    prompt.ids,
                    params,
                    partial(put, len(jobs)),
                    tenant=self.tenant,
                    guide=None if self.grammar is None else self.grammar.guide(),
                    # Each choice gives the scored prompt back, so none can do without computing it.
                    parent=None if self.score_prompts else first,
                    prompt_logprobs=self.score_prompts,
                    spans=prompt.spans,
                    exact=self.exact,
                )
                first = first or job
                jobs.append(job)
        return jobs


class Generation:
    """The jobs of one request and their events, on the event loop. Who starts it must cancel it in the end."""

    def __init__(self, runner: Worker, plan: Plan, metrics: EngineMetrics, pace: Pace) -> None:
        self._runner, self._metrics, self._pace = runner, metrics, pace
        self._whole = not plan.stream
        self._events: list[tuple[int, Event]] = []
        self._changed = asyncio.Event()
        self._abandoned = False
        self._left = plan.answers
        self._jobs = plan.jobs(self._put)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self._left == 0

    def start(self) -> None:
        """Queue the jobs. Raises QueueFull, ShuttingDown."""
        self._metrics.arrived(self._jobs)
        try:
            self._runner.submit(self._jobs)
        except RequestError:
            self._metrics.refused(self._jobs)
            raise

    def cancel(self) -> None:
        """End what still runs; nothing happens to finished jobs."""
        self._runner.cancel(self._jobs)
        self._metrics.ended(self._jobs)

    def abandon(self) -> None:
        """The client is gone."""
        self._abandoned = True
        self._changed.set()

    async def events(self) -> list[tuple[int, Event]]:
        """What has happened since the last call, at least one event; for a whole answer everything, at its end.

        After a failure nothing follows. Raises ClientDisconnect when the client is gone.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._abandoned:
            raise ClientDisconnect
        taken, self._events = self._events, []
        return taken

    def _put(self, index: int, event: Event) -> None:
        if self.over:
            return
        self._events.append((index, event))
        if isinstance(event, Finished):
            self._left -= 1
            self._pace.finished()
        elif isinstance(event, Failed):
            self._left = 0
        # A whole answer is woken once: its tokens cost nothing but the list.
        if self.over or not self._whole:
            self._changed.set()


class GenerationStream(Response):
    """A stream of events; however it ends, finished or with the client gone, the jobs behind it end too.

    Everything that has happened when the stream gets its turn goes out in one piece.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, opening: bytes, answer: StreamedAnswer, headers: dict[str, str]) -> None:
        """`opening`: what has happened so far."""
        super().__init__(headers={"cache-control": "no-cache", **headers})
        # No length is known; the empty body given to the base class has one.
        del self.headers["content-length"]
        self._generation, self._opening, self._answer = generation, opening, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda _: self._generation.abandon())
        try:
            await self._send(send)
        except (ClientDisconnect, OSError):
            pass  # nobody reads the rest
        finally:
            watch.cancel()
            self._generation.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._opening, "more_body": True})
        failed = False
        while not self._generation.over:
            happened = await self._generation.events()
            failed = isinstance(happened[-1][1], Failed)
            piece = b"".join([self._answer.add(index, event) for index, event in happened])
            if piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if failed else self._answer.closing()})


class Engine:
    """The application's state and its handlers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: Worker,
        *,
        context: int,
        delivery: Delivery,
        metrics: EngineMetrics,
        cutter: Cutter | None = None,
    ) -> None:
        """`context`: most tokens of prompt and answer together. `delivery` is what the runner delivers to. `cutter`
        finds the texts in prompts; without one nobody asks for them.
        """
        self._cutter = cutter
        self._checkpoint, self._runner, self._context, self._delivery = checkpoint, runner, context, delivery
        self._metrics = metrics
        self._pace = Pace()
        self._guidance = Guidance(checkpoint.tokenizer, checkpoint.config.vocab_size, checkpoint.eos_ids)
        self._vocabulary = Vocabulary(checkpoint.tokenizer.spelled, checkpoint.tokenizer.silent)
        self._created = int(time.time())

    def application(self) -> Starlette:
        """The ASGI application; its lifespan owns the worker thread."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self._delivery.open()
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
                Route("/health", self._healthz),  # where tools made for vLLM look
                Route("/metrics", self._show_metrics),
            ],
            exception_handlers={HTTPException: _not_found, RequestError: self._refused},
            lifespan=lifespan,
        )

    def _counted(self, endpoint: str, handler: Handler) -> Handler:
        async def counted(request: Request) -> Response:
            try:
                response = await handler(request)
            except RequestError as error:
                response = await self._refused(request, error)
            except ClientDisconnect:
                response = Response(status_code=499)
            self._metrics.request(endpoint, response.status_code)
            return response

        return counted

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        headers = {}
        if isinstance(error, QueueFull):
            headers["retry-after"] = str(self._pace.retry_after(self._runner.depth()[1]))
        return _json(error_body(error), error.status, headers)

    async def _chat(self, request: Request) -> Response:
        body = await _read(request)
        return await self._answer(request, await asyncio.to_thread(self._plan_chat, body, request.headers))

    async def _completions(self, request: Request) -> Response:
        body = await _read(request)
        return await self._answer(request, await asyncio.to_thread(self._plan_completion, body, request.headers))

    def _plan_chat(self, body: bytes, headers: Mapping[str, str]) -> Plan:
        asked = requests.parse_chat(requests.parse_body(body))
        self._check_model(asked.model)
        tokenizer = self._checkpoint.tokenizer
        tools = asked.tools_for_template()
        if tools and not tokenizer.takes_tools:
            raise RequestError("tools: this model's chat template takes none.", param="tools", code="no_tools")
        prompt = self._cut_chat(asked, tools)
        found = None
        if tools and tokenizer.tools is not None:
            names = frozenset(function.name for function in asked.functions)
            found = Tools(tokenizer.tools, names, parallel=asked.several_calls)
        shape = self._shape("chat", asked, logprobs=asked.alternatives, tools=found)
        params = self._params(asked, [prompt], limit=asked.limit, logprobs=asked.alternatives, param="messages")
        grammar = self._guidance.wanted(asked)
        whose = tenant(headers, asked.cache_salt)
        return Plan([prompt], params, shape, bool(asked.stream), whose, grammar, False, exact(headers))

    def _cut_chat(self, asked: requests.ChatRequest, tools: list[dict[str, Any]] | None) -> Cut:
        messages = [message.for_template() for message in asked.messages]
        if self._cutter is None:
            return Cut(self._checkpoint.tokenizer.encode_chat(messages, tools))
        contents = [message.model_dump(include={"content"}) for message in asked.messages]
        return self._cutter.chat(contents, messages, tools)

    def _plan_completion(self, body: bytes, headers: Mapping[str, str]) -> Plan:
        asked = requests.parse_completion(requests.parse_body(body))
        self._check_model(asked.model)
        prompts = [self._cut_prompt(prompt) for prompt in asked.prompt]
        echoes = None
        if asked.echo:
            texts = [self._prompt_text(prompt) for prompt in asked.prompt]
            pairs = [Echo(text, prompt.ids) for text, prompt in zip(texts, prompts, strict=True)]
            echoes = [echo for echo in pairs for _ in range(asked.choices)]
        shape = self._shape("completions", asked, logprobs=asked.logprobs, echoes=echoes)
        params = self._params(asked, prompts, limit=asked.limit, logprobs=asked.logprobs, param="prompt")
        scored = bool(asked.echo) and asked.logprobs is not None
        whose = tenant(headers, asked.cache_salt)
        return Plan(prompts, params, shape, bool(asked.stream), whose, None, scored, exact(headers))

    def _shape(
        self,
        endpoint: Literal["chat", "completions"],
        asked: requests.Sampled,
        *,
        logprobs: int | None,
        tools: Tools | None = None,
        echoes: Sequence[Echo] | None = None,
    ) -> Shape:
        return Shape(
            endpoint,
            self._checkpoint.name,
            logprobs=logprobs is not None,
            include_usage=asked.include_usage,
            vocabulary=self._vocabulary,
            tools=tools,
            echoes=echoes,
        )

    def _params(
        self,
        asked: requests.Sampled,
        prompts: list[Cut],
        *,
        limit: int | None,
        logprobs: int | None,
        param: str,
    ) -> list[SamplingParams]:
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest >= self._context:
            raise ContextTooLong(
                f"The context is {self._context} tokens; the prompt has {longest} and leaves no room to answer.",
                param=param,
            )
        if len(prompts) * asked.choices > requests.MAX_SEQUENCES:
            raise RequestError(f"At most {requests.MAX_SEQUENCES} answers (prompts times n) per request.", param="n")
        room = self._context - longest
        return [
            asked.sampling(
                self._checkpoint.defaults,
                max_tokens=room if limit is None else min(limit, room),
                logprobs=logprobs,
                vocab_size=self._checkpoint.config.vocab_size,
                choice=choice,
            )
            for choice in range(asked.choices)
        ]

    def _check_model(self, asked: str | None) -> None:
        if asked not in (None, self._checkpoint.name):
            raise ModelNotFound(asked, self._checkpoint.name)

    def _cut_prompt(self, prompt: str | list[int]) -> Cut:
        if not isinstance(prompt, str):
            cut = Cut(prompt)
        elif self._cutter is None:
            cut = Cut(self._checkpoint.tokenizer.encode_text(prompt))
        else:
            cut = self._cutter.text(prompt)
        if not cut.ids:
            raise RequestError("prompt: it has no tokens", param="prompt")
        if min(cut.ids) < 0 or max(cut.ids) >= self._checkpoint.config.vocab_size:
            raise RequestError(f"prompt: token ids are 0 to {self._checkpoint.config.vocab_size - 1}", param="prompt")
        return cut

    def _prompt_text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._checkpoint.tokenizer.decode(prompt)

    async def _answer(self, request: Request, plan: Plan) -> Response:
        generation = Generation(self._runner, plan, self._metrics, self._pace)
        usage = plan.usage()
        # Before the first byte of the response, so that a full queue is a plain 429 and not a broken stream.
        generation.start()
        if plan.stream:
            streamed = StreamedAnswer(plan.shape, usage, plan.answers, per_prompt=len(plan.params))
            return await self._opened(request, generation, streamed, usage)
        whole = WholeAnswer(plan.shape, usage, plan.answers, per_prompt=len(plan.params))
        return await self._whole(request, generation, whole, usage)

    async def _opened(self, request: Request, generation: Generation, answer: StreamedAnswer, usage: Usage) -> Response:
        """The stream, once a prompt has been computed: only then is known what the headers say, or that it failed."""
        started = False
        watch = asyncio.ensure_future(_disconnected(request.receive))
        watch.add_done_callback(lambda done: None if done.cancelled() else generation.abandon())
        try:
            happened = await generation.events()
            if isinstance(failed := happened[-1][1], Failed):
                return _json(failure_body(failed), failed.status)
            opening = answer.opening() + b"".join([answer.add(index, event) for index, event in happened])
            started = True
            return GenerationStream(generation, opening, answer, {KV_HEADER: usage.reuse()})
        finally:
            watch.cancel()
            if not started:
                generation.cancel()

    async def _whole(self, request: Request, generation: Generation, answer: WholeAnswer, usage: Usage) -> Response:
        """Wait for everything, unless the client goes away."""
        watch = asyncio.ensure_future(_disconnected(request.receive))
        watch.add_done_callback(lambda _: generation.abandon())
        try:
            for index, event in await generation.events():
                if (failed := answer.add(index, event)) is not None:
                    return _json(failure_body(failed), failed.status)
            return _sent(answer.body(), headers={KV_HEADER: usage.reuse()})
        finally:
            watch.cancel()
            generation.cancel()

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
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


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


def tenant(headers: Mapping[str, str], salt: str | None) -> str:
    """Whose request this is, for fairness and for what may be shared; one client's salts are tenants of their own.

    The gateway says it in `x-hitpath-tenant`; without it, whoever has the same credentials is the same tenant.
    """
    name = headers.get("x-hitpath-tenant")
    if name is None:
        credentials = headers.get("authorization", "")
        name = hashlib.sha256(credentials.encode()).hexdigest()[:32] if credentials else ""
    return name if salt is None else f"{name}\x00{salt}"


def exact(headers: Mapping[str, str]) -> bool:
    """Whether the client wants every token of its prompt computed where it stands. Raises RequestError."""
    asked = headers.get(KV_HEADER)
    if asked not in (None, EXACT):
        message = f"{KV_HEADER}: {asked!r} is not allowed; allowed is {EXACT!r}, or no such header."
        raise RequestError(message, param=KV_HEADER, code="invalid_value")
    return asked is not None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return _sent(orjson.dumps(body), status, headers)


def _sent(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, "application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = RequestError(f"{request.method} {request.url.path}: {error.detail}", code="unknown_url")
    return _json(error_body(refusal), error.status_code, dict(error.headers or {}))
