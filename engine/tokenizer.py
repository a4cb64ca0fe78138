"""Text to tokens and back: the checkpoint's own `tokenizer.json` and chat template.

Templates come with the checkpoint, so they run in Jinja's sandbox with the helpers that published templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from engine.errors import CheckpointError, RequestError

UNFINISHED = "\ufffd"
"""What decoding puts where bytes do not form a character (yet)."""


class ChatTokenizer:
    """Encodes prompts and conversations, decodes answers."""

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any], template: str | None) -> None:
        """`settings` is the decoded tokenizer_config.json. Raises jinja2.TemplateSyntaxError."""
        self._tokenizer = tokenizer
        self._special = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(settings.get(name))) is not None
        }
        self._template = None if template is None else _compile(template)
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_id(self) -> int | None:
        """Id of the tokenizer's own end token, where it names one."""
        return self._id("eos_token")

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a bare prompt, with the special tokens the tokenizer puts around one.

        An empty prompt becomes the begin token, so that there is something to continue.
        """
        ids: list[int] = self._tokenizer.encode(text).ids
        begin = self._id("bos_token")
        return ids if ids or begin is None else [begin]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """Token ids of a conversation that waits for the assistant. Raises RequestError where the template refuses."""
        text = self.render(messages, tools)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """The conversation as the text that the model was trained on."""
        if self._template is None:
            raise RequestError("This model has no chat template; use /v1/completions.", code="no_chat_template")
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """One token by itself, special ones included; for log probabilities."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        found: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return found


class Detokenizer:
    """Turns tokens into text as they come, never cutting a character in two.

    Decoders look at neighbours (spaces, bytes of one character), so every step decodes a little of what came before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # start of the tokens decoded with the new ones
        self._done = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        text = self._new_text()
        self._context = self._done = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]


def load_tokenizer(directory: Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json and the chat template. Raises CheckpointError naming the file."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; only checkpoints with a tokenizer.json can be served")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise CheckpointError(f"{path}: {error}") from error
    settings = read_object(directory / "tokenizer_config.json", optional=True)
    try:
        return ChatTokenizer(tokenizer, settings, _template_text(directory, settings))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{directory}: chat template, line {error.lineno}: {error.message}") from error


def read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError naming the file."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _template_text(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: chat_template: expected text")
    return template


def _token_text(value: object) -> str | None:
    """Special tokens are written as text, or as an object around it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class says so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drop the tags, keep what stands between."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
