"""KV events over real sockets, read with structs of the tests' own, as a router of vLLM would."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from engine.blocks import AllCleared, BlockRemoved, BlockStored
from engine.events import END, EventsError, EventSettings, Publisher
from engine.reuse.known import ChunkRemoved, ChunkStored

HASHES = tuple(bytes([i]) * 32 for i in range(1, 200))
SHORT = [int.from_bytes(one[:8], "big") for one in HASHES]


class Stored(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", omit_defaults=True):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class OldStored(msgspec.Struct, tag="BlockStored", array_like=True, omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


class OldRemoved(msgspec.Struct, tag="BlockRemoved", array_like=True, omit_defaults=True):
    block_hashes: list[int]
    medium: str | None


class OldCleared(msgspec.Struct, tag="AllBlocksCleared", array_like=True, omit_defaults=True):
    pass


class OldBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[OldStored | OldRemoved | OldCleared]


LOCAL = "tcp://127.0.0.1:*"


@contextlib.contextmanager
def publishing(settings: EventSettings, *, start: bool = True) -> Iterator[Publisher]:
    publisher = Publisher(settings)
    if start:
        publisher.start()
    try:
        yield publisher
    finally:
        publisher.close()


class Subscriber:
    """A router: what it hears, in order, and what it asks for again."""

    def __init__(self, publisher: Publisher, topic: str = "", *, patience: int = 1000) -> None:
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.rcvhwm = patience
        self._sub.subscribe(topic)
        self._sub.connect(publisher.endpoint)
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.rcvhwm = 0
        if publisher.replay_endpoint is not None:
            self._replay.connect(publisher.replay_endpoint)

    def wait_until_heard(self, publisher: Publisher) -> int:
        """Subscribing takes a moment: report until something arrives. Returns its sequence number."""
        while not self._sub.poll(20):
            publisher.put(AllCleared())
        sequence, _ = self.next()
        while self._sub.poll(100):
            sequence, _ = self.next()
        return sequence

    def next(self, timeout: int = 10_000) -> tuple[int, bytes]:
        assert self._sub.poll(timeout), "nothing was sent"
        _, sequence, payload = self._sub.recv_multipart()
        assert len(sequence) == 8
        return int.from_bytes(sequence, "big"), payload

    def everything(self) -> list[tuple[int, bytes]]:
        found = [self.next()]
        while self._sub.poll(300):
            found.append(self.next())
        return found

    def ask(self, frames: list[bytes]) -> None:
        self._replay.send_multipart(frames)

    def replayed(self, first: int) -> list[tuple[int, bytes]]:
        self.ask([b"", first.to_bytes(8, "big")])
        found: list[tuple[int, bytes]] = []
        while True:
            assert self._replay.poll(10_000), "the replay has no end"
            empty, sequence, payload = self._replay.recv_multipart()
            assert empty == b""
            if sequence == END:
                assert payload == b""
                return found
            found.append((int.from_bytes(sequence, "big"), payload))

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextlib.contextmanager
def subscribed(publisher: Publisher, topic: str = "", *, patience: int = 1000) -> Iterator[Subscriber]:
    subscriber = Subscriber(publisher, topic, patience=patience)
    try:
        yield subscriber
    finally:
        subscriber.close()


def stored(number: int, *, tokens: int = 4) -> BlockStored:
    return BlockStored((HASHES[number],), None, tuple(range(tokens)), tokens)


EVENTS = (
    BlockStored(HASHES[:2], None, (1, 2, 3, 4, 5, 6, 7, 8), 4),
    BlockStored(HASHES[2:3], HASHES[1], (9, 10, 11, 12), 4),
    BlockRemoved(HASHES[:1]),
    AllCleared(),
)


def events_of(messages: list[tuple[int, bytes]]) -> list[Stored | Removed | Cleared]:
    decoder = msgspec.msgpack.Decoder(Batch)
    return [event for _, payload in messages for event in decoder.decode(payload).events]


def test_events_read_as_those_of_vllm_do() -> None:
    with publishing(EventSettings(LOCAL, topic="kv@pod")) as publisher, subscribed(publisher, "kv@") as router:
        last = router.wait_until_heard(publisher)
        for event in EVENTS:
            publisher.put(event)
        messages = router.everything()
        assert [sequence for sequence, _ in messages] == list(range(last + 1, last + 1 + len(messages)))
        assert events_of(messages) == [
            Stored(list(SHORT[:2]), None, [1, 2, 3, 4, 5, 6, 7, 8], 4, None, "GPU", None),
            Stored([SHORT[2]], SHORT[1], [9, 10, 11, 12], 4, None, "GPU", None),
            Removed([SHORT[0]], "GPU"),
            Cleared(),
        ]
        batch = msgspec.msgpack.decode(messages[0][1], type=Batch)
        assert batch.data_parallel_rank == 0
        assert batch.ts > 1.7e9


def test_chunks_are_told_in_messages_of_their_own() -> None:
    with publishing(EventSettings(LOCAL)) as publisher, subscribed(publisher) as router:
        router.wait_until_heard(publisher)
        for event in (EVENTS[2], ChunkStored(HASHES[4], (1, 2)), EVENTS[3], ChunkRemoved(HASHES[4])):
            publisher.put(event)
        payloads = [msgspec.msgpack.decode(payload)[1] for _, payload in router.everything()]
        kinds = [{event["type"] for event in events} for events in payloads]
        assert all(not found & {"ChunkStored", "ChunkRemoved"} or not found & {"BlockRemoved"} for found in kinds)
        chunks = [event for events in payloads for event in events if event["type"].startswith("Chunk")]
        assert chunks == [
            {"type": "ChunkStored", "chunk_hash": SHORT[4], "token_ids": [1, 2]},
            {"type": "ChunkRemoved", "chunk_hash": SHORT[4]},
        ]
        assert [event["type"] for events in payloads for event in events if event not in chunks] == [
            "BlockRemoved",
            "AllBlocksCleared",
        ]


def test_routers_of_older_versions_are_given_arrays() -> None:
    with (
        publishing(EventSettings(LOCAL, replay=LOCAL, encoding="array")) as publisher,
        subscribed(publisher) as router,
    ):
        router.wait_until_heard(publisher)
        for event in EVENTS:
            publisher.put(event)
        decoder = msgspec.msgpack.Decoder(OldBatch)
        found = [event for _, payload in router.everything() for event in decoder.decode(payload).events]
        assert found == [
            OldStored(SHORT[:2], None, [1, 2, 3, 4, 5, 6, 7, 8], 4, None, "GPU"),
            OldStored([SHORT[2]], SHORT[1], [9, 10, 11, 12], 4, None, "GPU"),
            OldRemoved([SHORT[0]], "GPU"),
            OldCleared(),
        ]


def test_who_joins_late_is_told_what_was_before() -> None:
    with publishing(EventSettings(LOCAL, replay=LOCAL)) as publisher, subscribed(publisher) as router:
        for number in range(20):
            publisher.put(stored(number))
        while publisher.published == 0:
            router.replayed(0)
        sequence = router.wait_until_heard(publisher)
        replayed = router.replayed(0)
        assert [number for number, _ in replayed] == list(range(sequence + 1))
        hashes = [event.block_hashes[0] for event in events_of(replayed) if isinstance(event, Stored)]
        assert hashes == SHORT[:20]
        assert [number for number, _ in router.replayed(sequence)] == [sequence]
        assert router.replayed(sequence + 1) == []


def test_only_so_much_is_kept_for_a_replay() -> None:
    by_steps = EventSettings(LOCAL, replay=LOCAL, replay_steps=3)
    by_bytes = EventSettings(LOCAL, replay=LOCAL, replay_bytes=500)
    for settings in (by_steps, by_bytes):
        with publishing(settings) as publisher, subscribed(publisher) as router:
            for number in range(10):
                publisher.put(stored(number))
                while publisher.published <= number:
                    router.replayed(10)
            kept = [number for number, _ in router.replayed(0)]
            assert 0 < len(kept) <= 3
            assert kept == list(range(10 - len(kept), 10))


def test_a_slow_subscriber_sees_a_gap_and_fills_it() -> None:
    settings = EventSettings(LOCAL, replay=LOCAL, subscriber_steps=1)
    with publishing(settings) as publisher, subscribed(publisher, patience=1) as router:
        first = router.wait_until_heard(publisher) + 1
        count = 0
        while publisher.published < first + 150:  # far more than the sockets on the way hold
            publisher.put(stored(count % 150, tokens=60_000))
            count += 1
            while publisher.published + 10 < first + count:
                router.replayed(2**62)
        heard = [number for number, _ in router.everything()]
        # Whatever comes next shows that there is a gap, also where it was the last messages that found no room.
        assert router.wait_until_heard(publisher) >= first + 150
        missing = sorted(set(range(first, first + 150)) - set(heard))
        assert missing
        replayed = dict(router.replayed(missing[0]))
        assert set(missing) <= set(replayed)
        assert isinstance(events_of([(missing[0], replayed[missing[0]])])[0], Stored)
        assert publisher.dropped == 0


def test_a_full_queue_drops_counts_and_tells_subscribers_to_forget() -> None:
    with publishing(EventSettings(LOCAL, replay=LOCAL, queue=10), start=False) as publisher:
        for number in range(25):
            publisher.put(stored(number))
        assert publisher.dropped == 20
        publisher.start()
        with subscribed(publisher) as router:
            while not (messages := router.replayed(0)):
                pass
            assert events_of(messages) == [
                Cleared(),
                *(Stored([SHORT[i]], None, [0, 1, 2, 3], 4, None, "GPU", None) for i in range(19, 25)),
            ]


def test_what_waits_is_sent_before_the_end() -> None:
    with publishing(EventSettings(LOCAL, replay=LOCAL)) as publisher, subscribed(publisher) as router:
        last = router.wait_until_heard(publisher)
        for number in range(100):
            publisher.put(stored(number))
        publisher.close()
        messages = router.everything()
        assert messages[0][0] == last + 1
        assert len(events_of(messages)) == 100


def test_a_request_of_another_shape_harms_nobody() -> None:
    with publishing(EventSettings(LOCAL, replay=LOCAL)) as publisher, subscribed(publisher) as router:
        publisher.put(stored(1))
        for frames in ([b""], [b"", b"soon"], [b"", b"\0" * 8, b"more"], [b"\0" * 8]):
            router.ask(frames)
        while not (messages := router.replayed(0)):
            pass
        assert len(events_of(messages)) == 1


@pytest.mark.parametrize(
    "endpoint", ["5557", "tcp://*", "tcp://*:99999", "http://*:5557", "", "ipc:///no/such/folder/x"]
)
def test_an_endpoint_that_cannot_be_used_is_refused_by_its_flag(endpoint: str) -> None:
    with pytest.raises(EventsError, match=r"--kv-events .*: "):
        Publisher(EventSettings(endpoint))
    with pytest.raises(EventsError, match=r"--kv-events-replay .*: "):
        Publisher(EventSettings(LOCAL, replay=endpoint))


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EventsError, match=f"--kv-events-replay tcp://127.0.0.1:{port}: .*in use"):
            Publisher(EventSettings(LOCAL, replay=f"tcp://127.0.0.1:{port}"))


def test_an_address_without_a_wildcard_is_connected_to() -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.subscribe("")
        port = sub.bind_to_random_port("tcp://127.0.0.1")
        with publishing(EventSettings(f"tcp://127.0.0.1:{port}")) as publisher:
            while not sub.poll(20):
                publisher.put(AllCleared())
            assert len(sub.recv_multipart()) == 3
