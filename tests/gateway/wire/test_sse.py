from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.wire.sse import DONE, Event, EventTooLarge, SseParser, encode


def parse(*chunks: bytes) -> list[Event]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def told(events: list[Event]) -> list[tuple[str, bytes]]:
    """What a client learns: events without data or name are keep-alives and surplus blank lines."""
    return [(event.event, event.data) for event in events if event.data or event.event]


LINES = st.one_of(
    st.sampled_from([b"data: x", b"data:x", b"data", b"data:", b"data:  two", b": ping", b":", b"id: 1", b"retry: 5"]),
    st.sampled_from([b"event: e", b"event:e", b"other: y", b"", b"", b"", b"data: [DONE]"]),
    st.text(alphabet="aé漢😀 :", max_size=6).map(lambda text: b"data: " + text.encode()),
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]))).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [("", b"a")]),
        (b"data:a\r\n\r\n", [("", b"a")]),
        (b"data: a\r\r", [("", b"a")]),
        (b"data: a\ndata: b\n\n", [("", b"a\nb")]),
        (b"data\ndata: b\n\n", [("", b"\nb")]),
        (b"data:  a \n\n", [("", b" a ")]),
        (b"event: e\nid: 7\ndata: a\n\n", [("e", b"a")]),
        (b"data: a\nevent:e\n\n", [("e", b"a")]),
        (b": ping\n\ndata: a\n\n: ping\n\n", [("", b""), ("", b"a"), ("", b"")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [("", b"a"), ("", b"")]),
        (b"\xef\xbb\xbf\n\ndata: a\n\n", [("", b""), ("", b""), ("", b"a")]),
        (b"\n\ndata: a\n\n", [("", b""), ("", b""), ("", b"a")]),
        (b"data: a: b\n\n", [("", b"a: b")]),
        (b"data: a\n", []),
    ],
)
def test_the_rules_of_event_streams(stream: bytes, events: list[tuple[str, bytes]]) -> None:
    assert [(event.event, event.data) for event in parse(stream)] == events


@given(STREAMS, st.booleans())
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", False)
@example(b"data: \xf0\x9f\x98\x80\n\n", True)
def test_every_split_gives_the_same_events_and_every_byte_back(stream: bytes, bom: bool) -> None:
    stream = b"\xef\xbb\xbf" * bom + stream
    whole = told(parse(stream))
    for at in range(len(stream) + 1):
        parser = SseParser()
        events = parser.feed(stream[:at]) + parser.feed(stream[at:])
        assert told(events) == whole
        assert b"".join(event.raw for event in events) + parser.rest == stream
    parser = SseParser()
    events = [event for byte in stream for event in parser.feed(bytes([byte]))]
    assert told(events) == whole
    assert b"".join(event.raw for event in events) + parser.rest == stream
    assert parser.finish() == (not parser.rest)


@given(
    st.lists(st.binary(max_size=20).filter(lambda data: b"\r" not in data), min_size=1), st.sampled_from([None, "e"])
)
def test_what_is_encoded_is_parsed(payloads: list[bytes], name: str | None) -> None:
    events = parse(b"".join(encode(data, name) for data in payloads))
    assert [(event.event, event.data) for event in events] == [(name or "", data) for data in payloads]


def test_a_torn_crlf_delays_nothing() -> None:
    parser = SseParser()
    assert told(parser.feed(b"data: a\r\n\r")) == [("", b"a")]
    assert parser.finish()
    assert parser.feed(b"\n") == [Event(b"\n", "", b"")]


def test_finish_tells_a_stream_that_was_cut() -> None:
    parser = SseParser()
    assert parser.finish()
    parser.feed(b"data: a\n\ndata: b")
    assert not parser.finish()
    assert parser.rest == b"data: b"
    parser.feed(b"\n\n")
    assert parser.finish()


@pytest.mark.parametrize("head", [b"data: ", b"data:"])
def test_an_event_has_a_bound_whether_it_comes_whole_or_not(head: bytes) -> None:
    event = head + b"x" * (100 - len(head) - 2) + b"\n\n"
    assert len(SseParser(100).feed(event * 3)) == 3
    with pytest.raises(EventTooLarge):
        SseParser(99).feed(event)
    with pytest.raises(EventTooLarge):
        SseParser(99).feed(event[:-2] + b"xx")
    parser = SseParser(99)
    parser.feed(event[:50])
    with pytest.raises(EventTooLarge):
        parser.feed(event[50:])


def test_the_end_of_a_stream() -> None:
    assert parse(encode(DONE)) == [Event(b"data: [DONE]\n\n", "", DONE)]
