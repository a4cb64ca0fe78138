"""What clients may ask for: OpenAI's fields, closed and checked.

A field that this engine does not know is an error, unless it cannot change the answer: then it is listed and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.checkpoint import SamplingDefaults
from engine.errors import RequestError
from engine.sampling import SamplingParams
from engine.tools import NAME

MAX_STOP = 1024
"""Characters of a stop string."""

MAX_SEQUENCES = 64
"""Answers one request may ask for: prompts times `n`."""

_T = TypeVar("_T")

Anything = Any
"""Fields that name, bill or store a request; they never change an answer."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(_Closed):
    """One text part of a message's content list."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; keys beyond these (tool calls, names) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: object) -> object:
        if content is not None and not isinstance(content, str | list):
            raise ValueError("expected text or a list of text parts")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"content parts of type {kind!r} are not supported, only 'text'")
        return content

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as templates expect it: content as one text, arguments of tool calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        extra = {key: value for key, value in (self.model_extra or {}).items() if value is not None}
        if isinstance(extra.get("tool_calls"), list):
            extra["tool_calls"] = [_with_arguments(call) for call in extra["tool_calls"]]
        return {"role": self.role, "content": content, **extra}


class StreamOptions(_Closed):
    """Whether the stream ends with a chunk of token counts."""

    include_usage: bool | None = None
    include_obfuscation: Anything = None
    continuous_usage_stats: Anything = None
    """Load tools ask for counts in every chunk and read those of the last one as well."""


class JsonSchema(_Closed):
    """A named schema; answers follow it whether or not `strict` is set."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field({}, alias="schema")
    description: Anything = None
    strict: bool | None = None


class ResponseFormat(_Closed):
    """What the whole answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_asked(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that an answer must follow; None where any text will do."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return {"type": "object"}
            case "json_schema":
                return self.json_schema.schema_ if self.json_schema else {}


class Function(_Closed):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _callable(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("expected 1 to 64 letters, digits, '_' or '-'")
        return name

    @property
    def schema_wanted(self) -> dict[str, Any]:
        """The schema of its arguments; without one it has none."""
        none = {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters} if self.parameters else none


class Tool(_Closed):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class FunctionName(_Closed):
    """Which function."""

    name: str


class NamedTool(_Closed):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Sampled(_Closed):
    """Fields that chat and plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP)]] | None, BeforeValidator(_listed)] = (
        Field(None, max_length=16)
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=64)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    """Prompts with different salts never share what was computed for them."""
    user: Anything = None
    metadata: Anything = None
    store: Anything = None
    service_tier: Anything = None
    safety_identifier: Anything = None
    prompt_cache_key: Anything = None
    prompt_cache_retention: Anything = None

    @field_validator("logit_bias")
    @classmethod
    def _token_keys(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if any(not key.isascii() or not key.isdigit() or len(key) > 10 for key in bias or ()):
            raise ValueError("keys are token ids")
        return bias

    @model_validator(mode="after")
    def _options_need_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @property
    def choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def constrained(self) -> bool:
        """Whether the answer must have a form."""
        return False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, defaults: SamplingDefaults, *, max_tokens: int, logprobs: int | None, vocab_size: int, choice: int = 0
    ) -> SamplingParams:
        """How the answer number `choice` is drawn; each has a seed of its own. Raises RequestError."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        for field, ids in (("logit_bias", bias), ("stop_token_ids", self.stop_token_ids or ())):
            if any(token >= vocab_size for token in ids):
                raise RequestError(f"{field}: token ids are below {vocab_size}", param=field, code="invalid_value")
        return SamplingParams(
            temperature=_given(self.temperature, defaults.temperature),
            top_p=_given(self.top_p, defaults.top_p),
            top_k=max(0, _given(self.top_k, defaults.top_k)),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            logit_bias=bias,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            # A form says itself when it ends.
            min_tokens=0 if self.constrained else min(_given(self.min_tokens, defaults.min_tokens), max_tokens),
            max_tokens=max_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )

    def _check_least(self, limit: int | None) -> None:
        """Raises ValueError where fewer tokens are allowed than asked for."""
        if limit is not None and (self.min_tokens or 0) > limit:
            raise ValueError(f"min_tokens: at most {limit}, which is the limit of the answer")


class ChatRequest(Sampled):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Anything = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        return self

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _known_choice(cls, choice: object) -> object:
        words = ("none", "auto", "required")
        if choice is None or isinstance(choice, dict) or choice in words:
            return choice
        raise ValueError(f"expected one of {', '.join(words)} or a named function")

    @model_validator(mode="after")
    def _limits_agree(self) -> ChatRequest:
        self._check_least(self.limit)
        return self

    @model_validator(mode="after")
    def _tools_are_told_apart(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice: there are no tools to choose from")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is not among the tools")
        return self

    @model_validator(mode="after")
    def _an_end_can_come(self) -> ChatRequest:
        for field in ("ignore_eos", "min_tokens"):
            if self.constrained and getattr(self, field):
                raise ValueError(f"{field}: not allowed where the answer must have a form, which says when it ends")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that an answer must follow; None where any text will do."""
        return None if self.response_format is None else self.response_format.schema_wanted

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def several_calls(self) -> bool:
        """Whether an answer may call more than once."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    @property
    def constrained(self) -> bool:
        """Whether the answer must have a form."""
        return self.must_call or self.schema_wanted is not None

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """The tools as the client wrote them, unless none may be called."""
        if not self.functions:
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]

    @property
    def functions(self) -> list[Function]:
        """Those that may be called."""
        functions = [tool.function for tool in self.tools or ()]
        match self.tool_choice:
            case "none":
                return []
            case NamedTool(function=chosen):
                return [function for function in functions if function.name == chosen.name]
            case _:
                return functions

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, by its new or its old name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token to report, or None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """Body of `POST /v1/completions`."""

    prompt: list[str] | list[list[int]]
    """One or more prompts, each text or token ids; a single one may be sent without the list around it."""
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=0)
    """0 only with `echo`: nothing is written, the prompt comes back, with `logprobs` scored."""
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def limit(self) -> int:
        """Most tokens of an answer; OpenAI's default for this endpoint is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _limits_agree(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo")
        self._check_least(self.limit)
        return self

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, prompt: object) -> object:
        prompts = [prompt] if isinstance(prompt, str) or _all(prompt, int) else prompt
        texts, tokens = _all(prompts, str), isinstance(prompts, list) and all(_all(p, int) for p in prompts)
        if not prompts or not (texts or tokens):
            raise ValueError("expected text, token ids, or a list of either, and not an empty one")
        return prompts


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises RequestError."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return value


def parse_chat(raw: Mapping[str, Any]) -> ChatRequest:
    """Check a decoded body. Raises RequestError naming the field."""
    try:
        return ChatRequest.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def parse_completion(raw: Mapping[str, Any]) -> CompletionRequest:
    """Check a decoded body. Raises RequestError naming the field."""
    try:
        return CompletionRequest.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    """The first problem, in the words of the API."""
    problem = error.errors(include_url=False, include_input=False)[0]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".")
    text = problem["msg"].removeprefix("Value error, ")
    if not path:  # a rule across fields; its text begins with the field
        return RequestError(text, param=text.partition(":")[0] if ":" in text else None, code="invalid_value")
    if problem["type"] == "extra_forbidden":
        return RequestError(f"{path}: this parameter is not supported.", param=path, code="unsupported_parameter")
    if problem["type"] == "missing":
        return RequestError(f"{path}: this parameter is required.", param=path, code="missing_required_parameter")
    return RequestError(f"{path}: {text}", param=str(problem["loc"][0]), code="invalid_value")


def _all(value: object, kind: type) -> bool:
    """Whether it is a list, not empty, of nothing but `kind`; JSON's true and false are no numbers."""
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _with_arguments(call: object) -> object:
    """A tool call whose arguments are decoded: clients send JSON text, templates print objects."""
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
