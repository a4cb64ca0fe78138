"""Tool calls as the model families write them: found in an answer's text, and as a grammar for answers that must call.

Sources: the chat templates of Qwen2.5 and Qwen3 (Hermes' format), Llama 3.1 and Mistral. What does not read as a call
is never lost: it stays in the answer's text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal, NoReturn

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What functions may be called, as in OpenAI's API."""

_IDS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family marks its calls."""

    name: Literal["hermes", "llama", "mistral", "mistral-args"]
    opening: str
    """Text, or a special token, before a call."""
    closing: str = ""
    """Text after a call; models sometimes leave it out."""
    separator: str = ""
    """Text between two calls that follow one opening."""
    array: bool = False
    """One list of all calls, instead of an object per call."""
    head: str = ""
    """Ends the function's name where that stands before the arguments, which are then an object of their own."""
    arguments: str = "arguments"
    """The key of the arguments."""
    bare: bool = False
    """An answer that begins with an object is a call even without the opening, if it names one of the tools."""
    id_prefix: str = "call_"
    id_length: int = 24

    @property
    def markers(self) -> tuple[str, ...]:
        """Tokens that must not vanish from the text, special as they may be."""
        call_id = _CALL_ID if self.head else ""
        return tuple(text for text in (self.opening, self.closing, self.head, call_id) if text)

    def new_id(self) -> str:
        """An id for a call; Mistral's templates insist on nine letters or digits."""
        return self.id_prefix + "".join(secrets.choice(_IDS) for _ in range(self.id_length))


_CALL_ID = "[CALL_ID]"
HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
LLAMA = ToolFormat("llama", "<|python_tag|>", separator=";", arguments="parameters", bare=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", array=True, id_prefix="", id_length=9)
MISTRAL_ARGS = ToolFormat("mistral-args", "[TOOL_CALLS]", head="[ARGS]", id_prefix="", id_length=9)


def detect(template: str | None, added: Collection[str]) -> ToolFormat | None:
    """The format a checkpoint was trained on, told from its chat template and its added tokens."""
    if template is None or "tools" not in template:
        return None
    if HERMES.opening in template:
        # Qwen3-Coder puts XML between the same tags.
        return None if "<function=" in template else HERMES
    if MISTRAL.opening in added:
        return MISTRAL_ARGS if MISTRAL_ARGS.head in added else MISTRAL
    return LLAMA if LLAMA.opening in added else None


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


Piece = str | Call


class _State(Enum):
    START = auto()  # nothing but spaces so far
    TEXT = auto()  # looking for an opening
    HEAD = auto()  # behind an opening
    BODY = auto()  # inside JSON
    AFTER = auto()  # behind a call


class CallScanner:
    """Parts an answer into text and calls as it comes.

    A call is given out when its JSON is complete and valid, never before: what was sent cannot be taken back. The same
    text gives the same pieces however it is cut (texts next to each other add up).
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, parallel: bool = True) -> None:
        """`names`: the tools offered. Without `parallel` only the first call is given out."""
        self._form, self._names, self._parallel = form, frozenset(names), parallel
        self._state = _State.START if form.bare else _State.TEXT
        self._held = ""  # not yet decided on
        self._raw: list[str] = []  # what the call under way was read from
        self._body: list[str] = []
        self._name: str | None = None  # where it stands before the arguments
        self._end = _JsonEnd()
        self._adjacent = False  # nothing but spaces since the last call
        self._out: list[Piece] = []
        self.calls = 0
        """Calls given out so far."""

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        while self._step(final=False):
            pass
        return self._taken()

    def flush(self) -> list[Piece]:
        """What is left at the end; an unfinished call is text."""
        while self._step(final=True):
            pass
        return self._taken()

    def _step(self, *, final: bool) -> bool:
        """Decide on some of what is held; whether there may be more to decide."""
        match self._state:
            case _State.START:
                return self._start(final)
            case _State.TEXT:
                return self._text(final)
            case _State.HEAD:
                return self._head(final)
            case _State.BODY:
                return self._inside(final)
            case _State.AFTER:
                return self._after(final)

    def _start(self, final: bool) -> bool:
        begun = self._held.lstrip()
        if not begun and not final:
            return False
        self._state = _State.TEXT
        if begun.startswith("{"):
            self._open(len(self._held) - len(begun))
        return True

    def _text(self, final: bool) -> bool:
        at = self._held.find(self._form.opening)
        if at >= 0:
            before = self._held[:at].rstrip()
            self._give(before)
            self._held = self._held[len(before) :]
            self._open(at - len(before) + len(self._form.opening))
            return True
        keep = 0 if final else self._undecided()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if not (final and self._adjacent and not shown.strip()):
            self._give(shown)
        return False

    def _undecided(self) -> int:
        """Length of the end that may belong to an opening: its first letters, and spaces before."""
        text, opening = self._held, self._form.opening
        begun = next((n for n in range(min(len(text), len(opening) - 1), 0, -1) if opening.startswith(text[-n:])), 0)
        return len(text) - len(text[: len(text) - begun].rstrip())

    def _open(self, length: int) -> None:
        """Go inside, past the first `length` characters held."""
        self._raw, self._body, self._name, self._end = [self._held[:length]], [], None, _JsonEnd()
        self._held = self._held[length:]
        self._state = _State.HEAD

    def _head(self, final: bool) -> bool:
        begun = self._held.lstrip()
        if self._form.head and not self._name:
            return self._named(begun, final)
        if begun.startswith("[" if self._form.array else "{"):
            self._take(len(self._held) - len(begun))
            self._state = _State.BODY
            return True
        return self._broken() if begun or final else False

    def _named(self, begun: str, final: bool) -> bool:
        found = re.match(rf"({NAME.pattern})(?:{re.escape(_CALL_ID)}\w{{1,64}})?{re.escape(self._form.head)}", begun)
        if found is not None:
            self._name = found[1]
            self._take(len(self._held) - len(begun) + found.end())
            return True
        # Longer than any name, or with what no name has: it will not become one.
        if final or len(begun) > 256 or not re.fullmatch(r"[\w-]*(?:\[[\w\]]*){0,2}", begun):
            return self._broken()
        return False

    def _inside(self, final: bool) -> bool:
        end = self._end.feed(self._held)
        taken = self._take(len(self._held) if end is None else end)
        self._body.append(taken)
        if end is None:
            return self._broken() if final else False
        calls = self._read("".join(self._body))
        if calls is None:
            return self._broken()
        for call in calls if self._parallel else calls[: 1 - min(1, self.calls)]:
            self._out.append(call)
            self.calls += 1
        self._raw, self._adjacent, self._state = [], True, _State.AFTER
        return True

    def _after(self, final: bool) -> bool:
        begun = self._held.lstrip()
        follows = self._form.closing or self._form.separator
        if not final and follows.startswith(begun) and begun != follows:
            return False
        self._state = _State.TEXT
        if follows and begun.startswith(follows):
            if self._form.separator:
                return self._next(begun, final)
            self._held = begun[len(follows) :]
        return True

    def _next(self, begun: str, final: bool) -> bool:
        """Behind a separator: another call, or text after all."""
        rest = begun[len(self._form.separator) :].lstrip()
        if not rest and not final:
            self._state = _State.AFTER
            return False
        if rest.startswith("{"):
            self._open(len(self._held) - len(rest))
        return True

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        self._raw.append(taken)
        return taken

    def _broken(self) -> Literal[True]:
        self._give("".join(self._raw))
        self._raw, self._state = [], _State.TEXT
        return True

    def _give(self, text: str) -> None:
        if text:
            self._out.append(text)
            self._adjacent = False

    def _taken(self) -> list[Piece]:
        taken, self._out = self._out, []
        return taken

    def _read(self, body: str) -> list[Call] | None:
        """The calls that complete JSON spells out, or None where it spells something else."""
        try:
            value = json.loads(body, parse_constant=_refuse)
            if self._name is not None:
                return [Call(self._name, _written(value))]
            items = value if self._form.array else [value]
            calls = [self._call(item) for item in items]
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        if self._form.bare and any(call.name not in self._names for call in calls):
            return None
        return calls or None

    def _call(self, item: Mapping[str, Any]) -> Call:
        arguments = item[self._form.arguments] if self._form.arguments in item else item["arguments"]
        if not NAME.fullmatch(item["name"]):
            raise ValueError
        return Call(item["name"], _written(arguments))


class _JsonEnd:
    """Finds where a JSON object or list ends, in text that comes in pieces; looks at every character once."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def feed(self, text: str) -> int | None:
        """Characters of `text` up to and with the end, or None while it is not there."""
        at = 0
        if self._escaped and text:
            self._escaped, at = False, 1
        while found := (_IN_TEXT if self._quoted else _OUTSIDE).search(text, at):
            at = found.end()
            match found[0]:
                case '"':
                    self._quoted = not self._quoted
                case "\\":
                    self._escaped = at == len(text)
                    at += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None


_IN_TEXT, _OUTSIDE = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and Infinity are not JSON


def _written(arguments: object) -> str:
    """Arguments as JSON text. Some models write that text themselves. Raises ValueError."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    if not isinstance(arguments, dict):
        raise ValueError
    text = json.dumps(arguments, ensure_ascii=False)
    text.encode()  # half a surrogate pair has no bytes
    return text


def grammar(
    form: ToolFormat,
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    parallel: bool,
    special: Callable[[str], int | None],
    schema: Callable[[Mapping[str, Any]], str],
) -> str:
    """Lark rules of which `calls` is one call of one of `functions` (name, schema of the arguments), or several.

    `special`: the id of a special token, None for plain text. `schema` writes a JSON schema as a Lark term.
    """

    def literal(text: str) -> str:
        id_ = special(text)
        return json.dumps(text) if id_ is None else f"<[{id_}]>"

    names = [f"call_{i}" for i in range(len(functions))]
    rules = [
        f"{rule}: {_call_rule(form, name, schema(parameters), literal)}"
        for rule, (name, parameters) in zip(names, functions, strict=True)
    ]
    rules.append(f"call: {' | '.join(names)}")
    opening = literal(form.opening)
    match form.name:
        case "hermes":
            rules.append(f'marked: {opening} "\\n" call "\\n" {literal(form.closing)}')
            rules.append('calls: marked ("\\n" marked)*' if parallel else "calls: marked")
        case "llama":
            rules.append("calls: call")  # the family calls one at a time
        case "mistral":
            several = '(", " call)*' if parallel else ""
            rules.append(f'calls: {opening} " "? "[" call {several} "]"')
        case "mistral-args":
            rules.append(f"marked: {opening} call")
            rules.append("calls: marked+" if parallel else "calls: marked")
    return "\n".join(rules)


def _call_rule(form: ToolFormat, name: str, schema: str, literal: Callable[[str], str]) -> str:
    if form.head:
        return f"{json.dumps(name)} {literal(form.head)} {schema}"
    begun = json.dumps({"name": name})[:-1] + f', "{form.arguments}": '
    return f'{json.dumps(begun)} {schema} "}}"'
