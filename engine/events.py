"""Which blocks of keys and values the engine holds, told to whoever routes by it, in the format of vLLM.

Stored chunks (docs/chunk-reuse.md) are told as well, as `ChunkStored` and `ChunkRemoved`, in messages of their own, so
that who does not know these kinds loses nothing by throwing such a message away.

Each message of the PUB socket is [topic, sequence number (8 bytes, big-endian), msgpack of [seconds, events, rank]]. An
event is a map with its kind under `type` (vLLM since 0.24) or, for older routers, a tagged array.

A subscriber that is too slow loses messages: it sees a gap in the sequence numbers and asks the ROUTER socket of the
replay for them: [b"", first sequence number] gets one [b"", sequence number, payload] for each message still kept, and
[b"", -1, b""] as the end. What the engine itself had to drop cannot be replayed; there the subscriber is told to forget
everything, which is never wrong.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal, assert_never

import msgspec
import zmq

from engine.blocks import AllCleared, BlockEvent, BlockRemoved, BlockStored
from engine.reuse.known import ChunkEvent, ChunkRemoved, ChunkStored

MEDIUM = "GPU"
"""The tier that computes, on whatever hardware: routers take other names for slower tiers below it."""

END = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of the last message of a replay."""

_BATCH = 1024
"""Most events of one message."""
_PAUSE = 0.05
"""Seconds that a request for a replay may wait while nothing else happens."""
_LINGER_MS = 500


KvEvent = BlockEvent | ChunkEvent


class EventsError(Exception):
    """An endpoint cannot be used; the message names the flag."""


@dataclass(frozen=True, slots=True)
class EventSettings:
    """Where events go and how much is kept of them."""

    endpoint: str
    """`tcp://*:5557` (and `ipc://…`) listens there; an address without a wildcard is connected to, as vLLM does."""
    replay: str | None = None
    """Listens for requests to send again what was missed."""
    topic: str = ""
    encoding: Literal["map", "array"] = "map"
    queue: int = 100_000
    """Events that may wait to be sent."""
    replay_steps: int = 10_000
    replay_bytes: int = 64 * 2**20
    """What is kept for replay: so many messages, and no more than so many bytes."""
    subscriber_steps: int = 10_000
    """Messages that may wait for one slow subscriber before it loses some."""

    @property
    def listens(self) -> bool:
        """Whether the endpoint is listened on rather than connected to."""
        return "*" in self.endpoint or "::" in self.endpoint or self.endpoint.startswith(("ipc://", "inproc://"))


class Publisher:
    """Sends events from a thread of its own; whoever reports one never waits for the network.

    Use: create it before anything listens (EventsError when an endpoint is wrong or taken), `start`, hand `put` to what
    holds the blocks, `close` after that has stopped.
    """

    def __init__(self, settings: EventSettings) -> None:
        """Open the sockets. Raises EventsError."""
        self._settings = settings
        self._topic = settings.topic.encode()
        self._changed = threading.Condition()
        self._waiting: deque[KvEvent] = deque()
        self._closed = False
        self._kept: deque[tuple[bytes, bytes]] = deque()
        self._kept_bytes = 0
        self._encoder = msgspec.msgpack.Encoder()
        self.published = 0
        """Messages sent so far, which is also the next sequence number."""
        self.dropped = 0
        """Events that were never sent, because too many waited."""
        self._context = zmq.Context()
        try:
            self._pub = self._open(zmq.PUB, "--kv-events", settings.endpoint, settings.subscriber_steps)
            # A replay is sent in one go, and ZeroMQ counts what was read in steps of half its bound: a smaller one
            # would silently cut the replay.
            limit = 2 * settings.replay_steps + 1000
            replay = settings.replay
            self._replay = None if replay is None else self._open(zmq.ROUTER, "--kv-events-replay", replay, limit)
        except EventsError:
            self._context.destroy(linger=0)
            raise
        self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where subscribers find it, with the port that was taken for a wildcard."""
        self.replay_endpoint = None if self._replay is None else self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where replays are asked for."""
        self._thread = threading.Thread(target=self._run, name="hitpath-kv-events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, event: KvEvent) -> None:
        """Report an event, from any thread. Never waits: what no longer fits the queue is counted and dropped."""
        with self._changed:
            if len(self._waiting) >= self._settings.queue:
                self.dropped += len(self._waiting)
                self._waiting.clear()
                # Without them a subscriber would believe in blocks that are gone; it is told to forget all instead.
                self._waiting.append(AllCleared())
            self._waiting.append(event)
            self._changed.notify()

    def close(self) -> None:
        """Send what waits, close the sockets and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._context.destroy(linger=_LINGER_MS)

    def _open(self, kind: int, flag: str, endpoint: str, limit: int) -> zmq.Socket[bytes]:
        opened = self._context.socket(kind)
        opened.sndhwm = limit
        opened.ipv6 = "[" in endpoint
        try:
            _check_port(endpoint)
            if kind == zmq.PUB and not self._settings.listens:
                opened.connect(endpoint)
            else:
                opened.bind(endpoint)
        except zmq.ZMQError as error:
            problem = f"{flag} {endpoint}: {error.strerror} (expected an endpoint like tcp://*:5557)"
            raise EventsError(problem) from error
        return opened

    def _run(self) -> None:
        while (events := self._take()) is not None:
            for batch in _sorted(events):
                self._publish(batch)
            if self._replay is not None:
                self._answer(self._replay)

    def _take(self) -> list[KvEvent] | None:
        """What waits, at most one message's worth; None when closed and nothing is left."""
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait(_PAUSE)
            if self._closed and not self._waiting:
                return None
            return [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]

    def _publish(self, events: list[KvEvent]) -> None:
        batch = (time.time(), [_encoded(event, self._settings.encoding) for event in events], 0)
        payload = self._encoder.encode(batch)
        sequence = self.published.to_bytes(8, "big")
        # A PUB socket never waits: for a subscriber that is too slow it drops the message.
        self._pub.send_multipart((self._topic, sequence, payload))
        self.published += 1
        if self._replay is not None:
            self._keep(sequence, payload)

    def _keep(self, sequence: bytes, payload: bytes) -> None:
        self._kept.append((sequence, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self._settings.replay_steps or self._kept_bytes > self._settings.replay_bytes:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        """Send again what was asked for; a request of another shape is not answered."""
        while replay.poll(0):
            frames = replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                logging.getLogger("hitpath.engine").warning("a request for KV events that is no sequence number")
                continue
            client, _, first = frames
            for sequence, payload in self._kept:
                if sequence >= first:  # big-endian: bytes compare as the numbers do
                    self._send(replay, client, sequence, payload)
            self._send(replay, client, END, b"")

    def _send(self, replay: zmq.Socket[bytes], client: bytes, sequence: bytes, payload: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it went away
            replay.send_multipart((client, b"", sequence, payload), zmq.NOBLOCK)


class _Stored(msgspec.Struct, tag="BlockStored", gc=False):
    """Blocks that can be found from now on; a chain, so each is the parent of the next."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None


class _Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    """Blocks that are gone."""

    block_hashes: list[int]
    medium: str


class _Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """Nothing is held any more."""


class _ChunkStored(msgspec.Struct, tag="ChunkStored", gc=False):
    """A text's keys and values can be used from now on, wherever in a prompt it stands."""

    chunk_hash: int
    token_ids: tuple[int, ...]


class _ChunkRemoved(msgspec.Struct, tag="ChunkRemoved", gc=False):
    """They are gone."""

    chunk_hash: int


class _ChunkStoredArray(_ChunkStored, tag="ChunkStored", array_like=True):
    """The same, with its kind first and the fields in order."""


class _ChunkRemovedArray(_ChunkRemoved, tag="ChunkRemoved", array_like=True):
    """The same, with its kind first and the fields in order."""


class _StoredArray(_Stored, tag="BlockStored", array_like=True):
    """The same, with its kind first and the fields in order."""


class _RemovedArray(_Removed, tag="BlockRemoved", array_like=True):
    """The same, with its kind first and the fields in order."""


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True):
    """The same, with its kind alone."""


def _check_port(endpoint: str) -> None:
    """ZeroMQ takes a port beyond the last one modulo 65536. Raises its own error instead."""
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp://") and port.isdigit() and int(port) > 65535:
        raise zmq.ZMQError(zmq.EINVAL)


def _sorted(events: list[KvEvent]) -> list[list[KvEvent]]:
    """A message's worth of blocks' events and one of chunks', each where there are any."""
    chunks = [event for event in events if isinstance(event, ChunkStored | ChunkRemoved)]
    blocks = [event for event in events if not isinstance(event, ChunkStored | ChunkRemoved)] if chunks else events
    batches: list[list[KvEvent]] = [[*blocks], [*chunks]]
    return [batch for batch in batches if batch]


def _encoded(event: KvEvent, encoding: Literal["map", "array"]) -> msgspec.Struct:
    array = encoding == "array"
    match event:
        case BlockStored(hashes, parent, tokens, size):
            above = None if parent is None else _short(parent)
            stored = _StoredArray if array else _Stored
            return stored([_short(one) for one in hashes], above, tokens, size, None, MEDIUM, None)
        case BlockRemoved(hashes):
            return (_RemovedArray if array else _Removed)([_short(one) for one in hashes], MEDIUM)
        case ChunkStored(name, tokens):
            return (_ChunkStoredArray if array else _ChunkStored)(_short(name), tokens)
        case ChunkRemoved(name):
            return (_ChunkRemovedArray if array else _ChunkRemoved)(_short(name))
        case AllCleared():
            return (_ClearedArray if array else _Cleared)()
        case _ as never:
            assert_never(never)


def _short(block_hash: bytes) -> int:
    """The last 64 bits: vLLM's default, and what routers written in other languages can hold."""
    return int.from_bytes(block_hash[-8:], "big")
