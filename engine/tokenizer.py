"""Text to tokens and back: the checkpoint's own `tokenizer.json` and chat template.

Templates come with the checkpoint, so they run in Jinja's sandbox with the helpers that published templates expect.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

from engine.errors import CheckpointError, RequestError
from engine.tools import ToolFormat, detect

Offsets = NDArray[np.int64]
"""[N, 2]: of every token the first character and the one behind its last; the same where it has none."""

UNFINISHED = "\ufffd"
"""What decoding puts where bytes do not form a character (yet)."""

_SETTLED, _UNSETTLED = 16, 8
"""A character has four bytes at most: of this many tokens that end in none, all but the last few never will."""


class ChatTokenizer:
    """Encodes prompts and conversations, decodes answers."""

    def __init__(
        self, tokenizer: Tokenizer, settings: Mapping[str, Any], template: str | None, tool_template: str | None = None
    ) -> None:
        """`settings` is the decoded tokenizer_config.json; some models have a template of their own for calls with
        tools. Raises jinja2.TemplateSyntaxError.
        """
        self._tokenizer = tokenizer
        self._special = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(settings.get(name))) is not None
        }
        self._template = None if template is None else _compile(template)
        self._tool_template = self._template if tool_template is None else _compile(tool_template)
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self._added_ids = {str(token): id_ for id_, token in added.items()}
        self.tools: ToolFormat | None = detect(tool_template or template, self._added_ids)
        """How this model writes its tool calls, where that is known."""
        self.takes_tools: bool = "tools" in (tool_template or template or "")
        """Whether the chat template has a place for tools."""
        shown = set() if self.tools is None else set(self.tools.markers)
        self._silent = frozenset(id_ for id_, token in added.items() if token.special and str(token) not in shown)
        self._pieces = _byte_pieces(tokenizer, self.size) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None
        self._spoken = (
            None
            if self._pieces is None
            else [b"" if id_ in self._silent else piece for id_, piece in enumerate(self._pieces)]
        )
        self.spelled = lru_cache(2**16)(self._spelled)

    @property
    def eos_id(self) -> int | None:
        """Id of the tokenizer's own end token, where it names one."""
        return self._id("eos_token")

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a bare prompt, with the special tokens the tokenizer puts around one.

        An empty prompt becomes the begin token, so that there is something to continue.
        """
        return self.encode_offsets(text)[0]

    def encode_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """As `encode_text`, with the characters that each token stands for; special ones have none."""
        ids, offsets = self._encoded(text, special=True)
        begin = self._id("bos_token")
        return (ids, offsets) if ids or begin is None else ([begin], np.zeros((1, 2), np.int64))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """Token ids of a conversation that waits for the assistant. Raises RequestError where the template refuses."""
        return self.encode_rendered(self.render(messages, tools))[0]

    def encode_rendered(self, text: str) -> tuple[list[int], Offsets]:
        """Token ids of a conversation as `render` wrote it, and the characters that each token stands for."""
        return self._encoded(text, special=False)

    def _encoded(self, text: str, *, special: bool) -> tuple[list[int], Offsets]:
        # Batches of one: `encode` keeps all other threads from the interpreter while it works.
        added = special and self._tokenizer.num_special_tokens_to_add(False)
        if self._pieces is not None and not added:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
            ids = encoding.ids
            if (found := _offsets(text, [self._pieces[id_] for id_ in ids])) is not None:
                return ids, found
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=special)
        return encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """The conversation as the text that the model was trained on."""
        template = self._tool_template if tools else self._template
        if template is None:
            raise RequestError("This model has no chat template; use /v1/completions.", code="no_chat_template")
        try:
            return template.render(messages=messages, tools=tools, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except RecursionError as error:
            raise RequestError("messages: nested too deeply for the model's template.", param="messages") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer: without special tokens, but with those that mark a tool call."""
        text: str = self._tokenizer.decode([i for i in ids if i not in self._silent], skip_special_tokens=False)
        return text

    def detokenizer(self) -> Detokenizer | ByteDetokenizer:
        """Makes text of one answer's tokens as they come."""
        return Detokenizer(self.decode) if self._spoken is None else ByteDetokenizer(self._spoken)

    def silent(self, token: int) -> bool:
        """Whether the token is special and never shown."""
        return token in self._silent

    def added_id(self, text: str) -> int | None:
        """Id of the added token that is written so, special or not, if there is one."""
        return self._added_ids.get(text)

    def serialized(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def _spelled(self, token: int) -> tuple[str, bytes | None]:
        """One token by itself, special ones included, for log probabilities: its text, and its bytes where known."""
        if self._pieces is not None:
            piece = self._pieces[token] if token < len(self._pieces) else b""
            return piece.decode(errors="replace"), piece
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text, None if UNFINISHED in text else text.encode()

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        found: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return found


class ByteDetokenizer:
    """Turns tokens into text as they come, never cutting a character in two; one look-up per token.

    For vocabularies in which every token is a fixed run of bytes.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """`pieces`: the bytes of each token id; ids beyond have none."""
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        return self._decoder.decode(self._pieces[token]) if token < len(self._pieces) else ""

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        return self._decoder.decode(b"", final=True)


class Detokenizer:
    """Turns tokens into text as they come, never cutting a character in two.

    For every vocabulary: decoders look at neighbours (spaces, bytes of one character), so every step decodes the few
    tokens before it too.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # of these, tokens whose text has been given out; they are only context

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._text_until(len(self._ids))
        if text and not text.endswith(UNFINISHED):
            return self._give(text, len(self._ids))
        if len(self._ids) - self._shown < _SETTLED:
            return ""
        end = len(self._ids) - _UNSETTLED
        return self._give(self._text_until(end), end)

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        return self._give(self._text_until(len(self._ids)), len(self._ids))

    def _give(self, text: str, end: int) -> str:
        # What was context is not needed any more; what is shown now becomes it.
        del self._ids[: self._shown]
        self._shown = end - self._shown
        return text

    def _text_until(self, end: int) -> str:
        before = self._decode(self._ids[: self._shown])
        return self._decode(self._ids[:end])[len(before) :]


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
        return ChatTokenizer(tokenizer, settings, *_templates(directory, settings))
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


def _templates(directory: Path, settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and the one for calls with tools where it is another."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8"), None
    template, for_tools = settings.get("chat_template"), None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template, for_tools = named.get("default"), named.get("tool_use")
    for text in (template, for_tools):
        if text is not None and not isinstance(text, str):
            raise CheckpointError(f"{directory / 'tokenizer_config.json'}: chat_template: expected text")
    return template, for_tools


def _token_text(value: object) -> str | None:
    """Special tokens are written as text, or as an object around it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _offsets(text: str, pieces: Sequence[bytes]) -> Offsets | None:
    """Where these tokens stand in a text; None if they are not all that there is of it."""
    whole = text.encode()
    if b"".join(pieces) != whole:
        return None
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    edges = np.stack((np.roll(ends, 1), ends), 1)
    edges[:1, 0] = 0
    if len(whole) > len(text):  # a token has every character that it has a byte of
        begun = (np.frombuffer(whole, np.uint8) & 0xC0) != 0x80
        character = np.append(np.cumsum(begun) - 1, len(text))
        edges = np.stack((character[edges[:, 0]], character[edges[:, 1] - 1] + 1), 1)
    return edges


def _byte_pieces(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """The bytes of every token id, as the byte-level decoder reads them."""
    byte_of = _byte_alphabet()
    pieces = [b""] * size
    for text, id_ in tokenizer.get_vocab(with_added_tokens=True).items():
        # Added tokens may have letters outside the alphabet; those stand for themselves.
        known = all(letter in byte_of for letter in text)
        pieces[id_] = bytes(byte_of[letter] for letter in text) if known else text.encode()
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte: itself where it is visible, else the next one from 256 on (GPT-2)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


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
