"""Server-sent events, as the WHATWG event-stream rules have them, without losing a byte.

Every streamed token passes here, so the parser works with whole-buffer searches; a stream whose events are all
`data: …` and a blank line never leaves the fast path.
"""

from __future__ import annotations

from typing import NamedTuple

DONE = b"[DONE]"
"""The payload that ends the streams of chat and completions."""

MAX_EVENT = 16 * 1024 * 1024
"""Bytes one event may have unless the caller says otherwise."""

_BOM = b"\xef\xbb\xbf"
_EOLS = (b"\n", b"\r")


class EventTooLarge(Exception):
    """An event is longer than the parser's bound."""


class Event(NamedTuple):
    """One event with the bytes it came in.

    Comments, keep-alives and surplus blank lines are events without data, so that the `raw` of all events,
    joined, is the input.
    """

    raw: bytes
    """The exact bytes, blank line included."""
    event: str
    """The value of the `event:` field, empty when there is none."""
    data: bytes
    """The `data:` lines joined by LF; empty when there is none."""


class SseParser:
    """Cuts a byte stream into events, however the network cut it before.

    A CRLF torn after its CR ends the event at the CR, as a browser would; the LF that follows is then an event of
    its own without data. Holding the event back instead would cost a token's latency.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._rest = bytearray()
        self._at_start = True

    @property
    def rest(self) -> bytes:
        """The bytes of an event that is not complete yet."""
        return bytes(self._rest)

    def finish(self) -> bool:
        """Whether the stream ended between events."""
        return not self._rest

    def feed(self, chunk: bytes) -> list[Event]:
        """Take the next bytes, give the events that are complete now.

        Raises EventTooLarge; the parser is of no use afterwards.
        """
        if not self._rest:
            return self._cut(chunk, 0)
        known = len(self._rest)
        self._rest += chunk
        # Only the new bytes are searched: an event of megabytes costs its length once, not once per packet.
        if self._end(self._rest, 0, known) < 0:
            self._check_size(len(self._rest))
            return []
        buffer = bytes(self._rest)
        self._rest.clear()
        return self._cut(buffer, known)

    def _cut(self, buffer: bytes, known: int) -> list[Event]:
        """Cut a buffer into events and keep what is left; no blank line ends within the first `known` bytes."""
        events: list[Event] = []
        at, size, bound = 0, len(buffer), self._max_event
        while at < size:
            if buffer.startswith(b"data: ", at):
                eol = buffer.find(b"\n", at)
                if eol > 0 and buffer.startswith(b"\n", eol + 1) and buffer.find(b"\r", at, eol) < 0:
                    if eol + 2 - at > bound:
                        raise EventTooLarge(f"an event of more than {bound} bytes")
                    events.append(Event(buffer[at : eol + 2], "", buffer[at + 6 : eol]))
                    at = eol + 2
                    self._at_start = False
                    continue
            end = self._end(buffer, at, known)
            if end < 0:
                break
            events.append(self._parse(buffer[at:end]))
            at = end
        self._check_size(size - at)
        self._rest += buffer[at:]
        return events

    def _end(self, buffer: bytes | bytearray, at: int, known: int) -> int:
        """Give the offset just behind the event that starts at `at`, or -1."""
        start = at + len(_BOM) if self._at_start and buffer.startswith(_BOM, at) else at
        if buffer.startswith(_EOLS, start):
            return _past_eol(buffer, start)
        return _past_blank(buffer, max(start, known - 1))

    def _parse(self, raw: bytes) -> Event:
        self._check_size(len(raw))
        text = raw.removeprefix(_BOM) if self._at_start else raw
        self._at_start = False
        kind, data = b"", []
        for line in _lines(text):
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
            elif name == b"event":
                kind = value.removeprefix(b" ")
        return Event(raw, kind.decode(errors="replace"), b"\n".join(data))

    def _check_size(self, size: int) -> None:
        if size > self._max_event:
            raise EventTooLarge(f"an event of more than {self._max_event} bytes")


def _lines(text: bytes) -> list[bytes]:
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return text.split(b"\n")


def _past_eol(buffer: bytes | bytearray, at: int) -> int:
    return at + (2 if buffer.startswith(b"\r\n", at) else 1)


def _past_blank(buffer: bytes | bytearray, at: int) -> int:
    """Give the offset behind the first blank line from `at` on, or -1.

    A blank line is the second of two line ends, and so begins with LF LF, LF CR or CR CR.
    """
    while True:
        lf = buffer.find(b"\n", at)
        cr = buffer.find(b"\r\r", at, len(buffer) if lf < 0 else lf)
        if cr >= 0:
            return _past_eol(buffer, cr + 1)
        if lf < 0:
            return -1
        if buffer.startswith(_EOLS, lf + 1):
            return _past_eol(buffer, lf + 1)
        at = lf + 1


def encode(data: bytes, event: str | None = None) -> bytes:
    """Write one event; data of several lines becomes several `data:` lines."""
    head = b"" if event is None else b"event: %b\n" % event.encode()
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(_lines(data))
    return b"%bdata: %b\n\n" % (head, data)
