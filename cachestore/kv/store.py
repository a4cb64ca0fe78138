"""The door: `lookup → prepare_load → complete_load`, `prepare_store → complete_store`, `check`.

Loading::

    lookup = store.lookup(chunks)          # begins; the request may wait in a queue meanwhile
    lookup.wait(0.1), lookup.found         # what is there, in which tier, in how many bytes
    load = store.prepare_load(lookup, {0, 2})
    for pieces in load.layers():           # layer after layer, while later ones are still on their way
        ...                                # one tensor [2, tokens, kv_heads, head_dim] per wanted chunk, or None
    store.complete_load(load)

Storing::

    slot = store.prepare_store(chunk)      # or a `Refusal`
    store.complete_store(slot, kv)         # returns at once; encoded and written behind the caller's back

A chunk whose piece is None is lost, in this layer and all later ones, and must be computed: it was gone, came too late,
or was not what was written. Nothing here raises because a tier fails, and nothing that fails a check is handed out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from queue import Empty, Queue

import torch
from torch import Tensor

from cachestore.kv.codecs import CODECS, Damaged, Unfit
from cachestore.kv.format import (
    Chunk,
    Foreign,
    Geometry,
    Head,
    Part,
    head_size,
    note_size,
    read_head,
    read_title,
    salt,
    write_head,
)
from cachestore.kv.ledger import Key, Ledger
from cachestore.kv.shelf import Blob, Shelf, Ticket, Tier
from cachestore.kv.threads import step_back

_log = logging.getLogger("hitpath.kv")
_IDLE = 1.0
"""Seconds after which a writer with nothing to write looks for writes that failed."""


class Refusal(StrEnum):
    """Why a chunk is not taken."""

    KNOWN = "known"
    """It is here, or being stored."""
    BUSY = "busy"
    """As many bytes as may be are waiting to be written."""
    LARGE = "large"
    """Uncoded, it is larger than the capacity or the tenant's quota."""
    CLOSED = "closed"


class Lost(StrEnum):
    """Why a chunk that was asked for is not used."""

    ABSENT = "absent"
    DAMAGED = "damaged"
    """Not the bytes that were written; it is removed."""
    FOREIGN = "foreign"
    """Another model's, another version's or other tokens'; it is removed."""
    LATE = "late"
    """The tier did not answer in time."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is kept, and how."""

    capacity: int
    """Bytes over all tenants."""
    quota: int | None = None
    """Bytes of each tenant."""
    codec: str = "entropy"
    """What chunks are written as where nothing else is asked for."""
    in_flight: int = 256 << 20
    """Bytes that may wait to be encoded and written, or as many as there is room for, if that is less; beyond, storing
    is refused. A single chunk may always wait."""
    patience: float = 5.0
    """Seconds from the beginning of a load after which what has not come is lost."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec: {self.codec!r} is none of {', '.join(CODECS)}")
        if self.in_flight < 1 or self.patience <= 0:
            raise ValueError("in_flight and patience must be positive")


@dataclass(frozen=True, slots=True)
class Found:
    """A stored chunk, whose head was read and fits."""

    tier: Tier
    """Where its parts are, as far as that is known."""
    codec: str
    size: int
    """Bytes to load."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One chunk that was loaded whole, for whoever estimates bandwidths."""

    tier: Tier
    codec: str
    size: int
    """Bytes that were read."""
    plain: int
    """Bytes that they became."""
    reading: float
    """Seconds spent waiting for them …"""
    decoding: float
    """… and checking and decoding them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A chunk is there and can be found."""

    key: Key
    tokens: tuple[int, ...]
    note: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """A chunk is no longer there: evicted, lost, dropped or never written."""

    key: Key


Happening = Transfer | Kept | Gone


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the store was opened, and what it holds now."""

    chunks: int
    bytes: int
    writing: int
    """Bytes that are neither written nor given up."""
    orders: int
    """What its writer has still to do: chunks to encode, and to drop."""
    stored: int
    """Chunks handed to the tiers."""
    unwritten: int
    """Chunks that were not: no room, or a write that failed."""
    evicted: int
    refused: dict[Refusal, int]
    hits: dict[Tier, int]
    """Chunks loaded whole."""
    read: dict[Tier, int]
    """Bytes of those."""
    seconds: dict[Tier, float]
    """Seconds spent waiting for those."""
    lost: dict[Lost, int]


class Lookup:
    """Heads on their way. Ends when it is loaded or closed."""

    def __init__(self, store: KvStore, chunks: Sequence[Chunk], heads: list[Ticket | None]) -> None:
        self._store, self.chunks, self._tickets = store, tuple(chunks), heads
        self._heads: list[tuple[Found, Head] | None] = [None] * len(heads)

    def done(self) -> bool:
        """Whether everything is known. Does not wait."""
        return self.wait(0.0)

    def wait(self, timeout: float) -> bool:
        """Wait up to so many seconds for all heads; whether they are here."""
        until = time.monotonic() + timeout
        for index, ticket in enumerate(self._tickets):
            if ticket is not None and ticket.done(max(0.0, until - time.monotonic())):
                self._heads[index] = self._store._read(self.chunks[index], ticket)
                self._tickets[index] = None
        return not any(self._tickets)

    @property
    def found(self) -> tuple[Found | None, ...]:
        """What is known so far, chunk by chunk; None: not there, or not known yet."""
        return tuple(None if entry is None else entry[0] for entry in self._heads)

    def head(self, index: int) -> Head | None:
        """The head of a chunk that was found."""
        entry = self._heads[index]
        return None if entry is None else entry[1]

    def close(self) -> None:
        """Let go of the heads that have not come. Not needed after `prepare_load`."""
        for ticket in self._tickets:
            if ticket is not None:
                self._store._answered(ticket)
        self._tickets = [None] * len(self._tickets)


class _Piece:
    """One chunk of a load: its parts on their way, and the layers of the part last asked for."""

    def __init__(self, chunk: Chunk, key: Key, head: Head, deadline: float) -> None:
        self.chunk, self.key, self.head, self._deadline = chunk, key, head, deadline
        self.tickets: list[Ticket | None] = [None] * len(head.parts)
        self.lost: Lost | None = None
        self.tier = Tier.MEMORY
        self.reading = self.decoding = 0.0
        self._at, self._kv = -1, torch.empty(0)

    def layer(self, layer: int) -> Tensor | None:
        """[2, tokens, kv_heads, head_dim], or None: it is lost."""
        if self.lost is None and (part := self._part(layer)) != self._at:
            self._take(part)
        return None if self.lost is not None else self._kv[layer - self.head.parts[self._at].form.first]

    def done(self) -> bool:
        """Whether all that is still to come has come."""
        return all(ticket is None or ticket.done() for ticket in self.tickets)

    def close(self) -> None:
        """Let go of everything."""
        for index, ticket in enumerate(self.tickets):
            if ticket is not None:
                ticket.release()
                self.tickets[index] = None
        self._kv = torch.empty(0)

    def _take(self, part: int) -> None:
        ticket = self.tickets[part]
        if ticket is None:
            raise ValueError("layers are asked for in order")
        began = time.monotonic()
        come = ticket.done(max(0.0, self._deadline - began))
        self.reading += time.monotonic() - began
        if not come:
            self.lost = Lost.LATE
            return
        try:
            self._kv = self._decode(ticket, self.head.parts[part])
            self._at, self.tier = part, max(self.tier, ticket.tier, key=list(Tier).index)
        except _Gone:
            self.lost = Lost.ABSENT
        except Damaged:
            self.lost = Lost.DAMAGED
        ticket.release()
        self.tickets[part] = None

    def _decode(self, ticket: Ticket, part: Part) -> Tensor:
        code = ticket.code()
        if code is None:
            raise _Gone
        began = time.monotonic()
        part.verify(code)
        kv = CODECS[self.head.codec].decode(code, part.form)
        self.decoding += time.monotonic() - began
        return kv

    def _part(self, layer: int) -> int:
        return layer // self.head.parts[0].form.layers


class _Gone(Exception):
    """A part is not there."""


class Load:
    """Chunks on their way, layer by layer. Ends with `complete_load`."""

    def __init__(self, layers: int, pieces: list[_Piece | None]) -> None:
        self._layers, self.pieces = layers, pieces
        self.consumed = False
        """Whether every layer was asked for."""

    def done(self) -> bool:
        """Whether every byte is here, so that no layer will be waited for."""
        return all(piece is None or piece.done() for piece in self.pieces)

    def tier(self, index: int) -> Tier:
        """Where a wanted chunk came from so far, or its slowest part."""
        piece = self.pieces[index]
        return Tier.MEMORY if piece is None else piece.tier

    def note(self, index: int) -> bytes:
        """What was written down with a wanted chunk; nothing where it is not there."""
        piece = self.pieces[index]
        return b"" if piece is None else piece.head.note

    def layers(self) -> Iterator[list[Tensor | None]]:
        """One list a layer: for every wanted chunk, in the lookup's order, [2, tokens, kv_heads, head_dim] or None.

        Waits for bytes that have not come, up to the store's patience.
        """
        for layer in range(self._layers):
            row = [None if piece is None else piece.layer(layer) for piece in self.pieces]
            self.consumed = layer == self._layers - 1
            yield row

    def whole(self) -> list[Tensor | None]:
        """All layers at once: [layers, 2, tokens, kv_heads, head_dim] or None for every wanted chunk."""
        columns = [[piece for piece in column if piece is not None] for column in zip(*self.layers(), strict=True)]
        return [torch.stack(column) if len(column) == self._layers else None for column in columns]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Room for one chunk. Ends with `complete_store`."""

    chunk: Chunk
    key: Key
    codec: str
    size: int
    """Bytes that are reserved for it: those of its keys and values."""


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """What the writer is to do."""

    slot: Slot
    kv: Tensor
    importance: Tensor | None
    note: bytes


class KvStore:
    """Keys and values of chunks in tiers below the engine's pool. Any thread may call; one more writes."""

    def __init__(
        self,
        geometry: Geometry,
        shelf: Shelf,
        options: Options,
        *,
        observe: Callable[[Happening], None] | None = None,
    ) -> None:
        """`shelf` belongs to the store from now on. `observe` hears what happens, on any thread; it must not block."""
        self.geometry, self._shelf, self._options, self._observe = geometry, shelf, options, observe
        self._ledger = Ledger(options.capacity, options.quota)
        self._lock = threading.RLock()
        self._slots: dict[Key, Slot] = {}
        """What is being stored."""
        self._reserved = 0
        self._loads = 0
        self._asked = 0
        """Heads on their way."""
        self._closed = self._given_up = False
        self._counts: Counter[str] = Counter()
        self._refused: Counter[Refusal] = Counter()
        self._lost: Counter[Lost] = Counter()
        self._hits: Counter[Tier] = Counter()
        self._read_bytes: Counter[Tier] = Counter()
        self._seconds: dict[Tier, float] = {}
        for kept in (inherited := shelf.kept()):
            self._enter(kept.key, kept.size)
        self._inherited = {kept.key: kept.head for kept in inherited if kept.key in self._ledger}
        """What an earlier process left and `recall` has not told: by key, the bytes of its head."""
        self._orders: Queue[_Order | Key | None] = Queue()
        self._writer = threading.Thread(target=self._write, name="kv-write", daemon=True)
        self._writer.start()

    # -- loading

    def lookup(self, chunks: Sequence[Chunk]) -> Lookup:
        """Begin to find out which of these are stored. Never blocks on I/O."""
        return Lookup(self, chunks, [self._ask(chunk) for chunk in chunks])

    def may_have(self, chunk: Chunk) -> bool:
        """Whether it is worth looking up. Asks nobody: what others may have put on a shared shelf may be there."""
        with self._lock:
            return self._shelf.shared or self._key(chunk) in self._ledger

    def prepare_load(self, lookup: Lookup, wanted: Collection[int] | None = None) -> Load:
        """Begin to load what was found: all of it, or the chunks with these indices. They stay until `complete_load`.

        `Load.layers` has one entry for each of them, those not found as lost. Ends the lookup.
        """
        if not lookup.done():
            self._lose(Lost.LATE)
        lookup.close()
        deadline = time.monotonic() + self._options.patience
        chosen = range(len(lookup.chunks)) if wanted is None else sorted(wanted)
        pieces = [self._piece(lookup.chunks[index], lookup.head(index), deadline) for index in chosen]
        # Part by part over all chunks, since that is the order in which they will be needed.
        for part in range(max((len(piece.tickets) for piece in pieces if piece is not None), default=0)):
            for piece in pieces:
                if piece is not None and part < len(piece.tickets):
                    size = piece.head.parts[part].size
                    piece.tickets[part] = self._shelf.fetch(Blob(piece.key, part + 1, size))
        with self._lock:
            self._loads += 1
        return Load(self.geometry.layers, pieces)

    def complete_load(self, load: Load) -> None:
        """The load is over, used or not. Exactly once."""
        with self._lock:
            self._loads -= 1
        for piece in load.pieces:
            if piece is None:
                continue
            piece.close()
            with self._lock:
                self._ledger.unpin(piece.key)
            if piece.lost is not None:
                self._lose(piece.lost)
                if piece.lost is not Lost.LATE:
                    self._remove(piece.key)
            elif load.consumed:
                self._loaded(piece)

    def recall(self, most: int) -> int:
        """Tell `observe` of up to `most` chunks that an earlier process left; how many it has not told of yet.

        Reads their heads, and waits for them: call it when there is time. What is not what was written is removed.
        """
        for key in [key for key, _ in zip(list(self._inherited), range(most), strict=False)]:
            self._recall(key, self._inherited.pop(key))
        return len(self._inherited)

    # -- storing

    def prepare_store(self, chunk: Chunk, codec: str | None = None) -> Slot | Refusal:
        """Reserve room for a chunk. Raises ValueError for a codec that does not exist."""
        if codec is not None and codec not in CODECS:
            raise ValueError(f"codec: {codec!r} is none of {', '.join(CODECS)}")
        key = self._key(chunk)
        size = len(chunk.tokens) * self.geometry.token_bytes
        with self._lock:
            refusal = self._refusal(key, size)
            if refusal is not None:
                self._refused[refusal] += 1
                return refusal
            slot = Slot(chunk, key, codec or self._options.codec, size)
            self._slots[key] = slot
            self._reserved += size
        return slot

    def complete_store(
        self, slot: Slot, kv: Tensor | None, *, importance: Tensor | None = None, note: bytes = b""
    ) -> None:
        """Hand over [layers, 2, tokens, kv_heads, head_dim], which nobody writes to any more; None: there is none.

        Returns at once. `importance` float [tokens], for codecs that ask. `note` is kept in the head and comes back
        with every load, filled up with zeros to `note_size`. Raises ValueError for another shape or dtype, or a note
        that is longer.
        """
        shape = (self.geometry.layers, 2, len(slot.chunk.tokens), self.geometry.kv_heads, self.geometry.head_dim)
        if kv is None:
            self._finish(slot)
        elif kv.shape != shape or kv.dtype != self.geometry.dtype or len(note) > note_size(len(slot.chunk.tokens)):
            self._finish(slot)
            what = f"{kv.dtype} {tuple(kv.shape)} with a note of {len(note)} bytes"
            raise ValueError(f"{what} is not {self.geometry.dtype} {shape} with {note_size(shape[2])} or less")
        else:
            self._orders.put(_Order(slot, kv, importance, note))

    def discard(self, chunk: Chunk) -> None:
        """It is not wanted any more. What is being loaded of it is loaded to the end."""
        self._remove(self._key(chunk))

    def flush(self, timeout: float) -> bool:
        """Wait until all is written where it is to stay, and dropped where it is not; whether that was so in time."""
        until = time.monotonic() + timeout
        while self._orders.unfinished_tasks or self._shelf.writing():
            if time.monotonic() >= until:
                return False
            time.sleep(0.002)
        return True

    # -- upkeep

    def stats(self) -> Stats:
        """See `Stats`."""
        with self._lock:
            return Stats(
                chunks=len(self._ledger),
                bytes=self._ledger.total,
                writing=self._reserved + self._shelf.writing(),
                orders=self._orders.unfinished_tasks,
                stored=self._counts["stored"],
                unwritten=self._counts["unwritten"],
                evicted=self._counts["evicted"],
                refused=dict(self._refused),
                hits=dict(self._hits),
                read=dict(self._read_bytes),
                seconds=dict(self._seconds),
                lost=dict(self._lost),
            )

    def check(self) -> list[str]:
        """What does not add up, or is held though nothing is loaded; empty is good. Cheap: call it when idle."""
        with self._lock:
            wrong = self._ledger.check()
            if self._reserved != sum(slot.size for slot in self._slots.values()):
                wrong.append(f"{self._reserved} bytes are reserved, the slots are {len(self._slots)}")
            if not self._loads and self._ledger.pinned():
                wrong.append(f"{self._ledger.pinned()} chunks are pinned and nothing is loaded")
            idle = not self._loads and not self._asked
        return wrong + (self._shelf.check() if idle else [])

    def close(self, timeout: float = 5.0) -> None:
        """Write what is waiting, for so many seconds at most, and let go of the shelf."""
        with self._lock:
            self._closed = True
        self._orders.put(None)
        self._writer.join(timeout)
        self._given_up = True
        self._writer.join()  # for the one chunk that it has in hand: the shelf must not go from under it
        if not self._orders.unfinished_tasks:
            self.flush(timeout)
        self._shelf.close()

    # -- within

    def _key(self, chunk: Chunk) -> Key:
        return (salt(chunk.tenant), chunk.name(self.geometry))

    def _ask(self, chunk: Chunk) -> Ticket | None:
        key = self._key(chunk)
        with self._lock:
            if not self._shelf.shared and key not in self._ledger:
                self._lost[Lost.ABSENT] += 1
                return None
            self._asked += 1
        return self._shelf.fetch(Blob(key, 0, head_size(self.geometry, len(chunk.tokens))))

    def _recall(self, key: Key, size: int) -> None:
        with self._lock:
            if key not in self._ledger:
                return
            self._asked += 1
        ticket = self._shelf.fetch(Blob(key, 0, size))
        try:
            if not ticket.done(self._options.patience):
                return  # it stays, and whoever asks for it by name finds it
            data = ticket.code()
            title = None if data is None else read_title(self.geometry, data)
        except (Damaged, Foreign):
            title = None
        finally:
            self._answered(ticket)
        if title is None or title.name != key[1]:
            self._lose(Lost.DAMAGED)
            self._remove(key)
        else:
            self._tell(Kept(key, title.tokens, title.note))

    def _tell(self, happened: Happening) -> None:
        if self._observe is not None:
            self._observe(happened)

    def _answered(self, ticket: Ticket) -> None:
        """A head has come, or nobody waits for it any more."""
        ticket.release()
        with self._lock:
            self._asked -= 1

    def _read(self, chunk: Chunk, ticket: Ticket) -> tuple[Found, Head] | None:
        """What a head that has come says; what is not good is removed."""
        key, data = self._key(chunk), ticket.code()
        reason = Lost.ABSENT
        try:
            if data is not None:
                head = read_head(self.geometry, chunk, data)
                with self._lock:
                    self._ledger.touch(key)
                # Heads are small and stay in memory longer: where the parts are is what loading will take.
                return Found(self._shelf.tier(key, 1), head.codec, head.size), head
        except Damaged:
            reason = Lost.DAMAGED
        except Foreign:
            reason = Lost.FOREIGN
        finally:
            self._answered(ticket)
        self._lose(reason)
        self._remove(key)
        return None

    def _piece(self, chunk: Chunk, head: Head | None, deadline: float) -> _Piece | None:
        if head is None:
            return None
        key = self._key(chunk)
        with self._lock:
            self._ledger.pin(key)
        return _Piece(chunk, key, head, deadline)

    def _loaded(self, piece: _Piece) -> None:
        size = piece.head.size
        with self._lock:
            self._hits[piece.tier] += 1
            self._read_bytes[piece.tier] += size
            self._seconds[piece.tier] = self._seconds.get(piece.tier, 0.0) + piece.reading
        plain = len(piece.chunk.tokens) * self.geometry.token_bytes
        self._tell(Transfer(piece.tier, piece.head.codec, size, plain, piece.reading, piece.decoding))

    def _lose(self, reason: Lost) -> None:
        with self._lock:
            self._lost[reason] += 1

    def _remove(self, key: Key) -> None:
        """Damaged, foreign or half gone: none of it is kept, so that it can be stored anew."""
        with self._lock:
            self._ledger.forget(key)
        self._orders.put(key)
        self._tell(Gone(key))

    def _refusal(self, key: Key, size: int) -> Refusal | None:
        if self._closed:
            return Refusal.CLOSED
        if key in self._slots or key in self._ledger:
            return Refusal.KNOWN
        # What waits in front of a store that is smaller would be written only to be evicted by what waits behind it.
        waiting = self._reserved + self._shelf.writing()
        if waiting and waiting + size > min(self._options.in_flight, self._options.capacity):
            return Refusal.BUSY
        return None if self._ledger.fits(size) else Refusal.LARGE

    def _finish(self, slot: Slot) -> None:
        with self._lock:
            if self._slots.pop(slot.key, None) is not None:
                self._reserved -= slot.size

    def _write(self) -> None:
        """The writer's life. Only here anything is written or dropped, so that neither overtakes the other."""
        step_back()
        while True:
            try:
                order = self._orders.get(timeout=_IDLE)
            except Empty:
                self._settle()
                continue
            try:
                match order:
                    case None:
                        return
                    case _ if self._given_up:
                        return
                    case _Order():
                        self._execute(order)
                    case key:
                        self._drop(key)
            except Exception:
                # Whatever went wrong, it is one chunk that is not kept, and the next one may be luckier.
                _log.exception("a chunk could not be stored")
            finally:
                self._orders.task_done()

    def _execute(self, order: _Order) -> None:
        kept = False
        try:
            self._settle()
            kept = self._keep(order)
        finally:
            self._finish(order.slot)
            with self._lock:
                self._counts["stored" if kept else "unwritten"] += 1
            if not kept:
                self._tell(Gone(order.slot.key))

    def _keep(self, order: _Order) -> bool:
        slot = order.slot
        codec, codes = self._encoded(order)
        blobs = [write_head(self.geometry, slot.chunk, codec, codes, order.note), *codes]
        if not self._enter(slot.key, sum(map(len, blobs))) or not self._put(slot.key, blobs):
            return False
        self._tell(Kept(slot.key, slot.chunk.tokens, order.note))
        return True

    def _put(self, key: Key, blobs: list[Tensor]) -> bool:
        if self._shelf.put(key, blobs):
            return True
        with self._lock:
            self._ledger.forget(key)
        return False

    def _encoded(self, order: _Order) -> tuple[str, list[Tensor]]:
        """The parts of a chunk, by the codec that was asked for or, where the values do not fit it, as they are."""
        forms = self.geometry.forms(len(order.slot.chunk.tokens))
        kv = order.kv.cpu()
        importance = None if order.importance is None else order.importance.cpu()
        try:
            codec = CODECS[order.slot.codec]
            return codec.name, [codec.encode(kv[f.first : f.first + f.layers], f, importance) for f in forms]
        except Unfit:
            raw = CODECS["raw"]
            return raw.name, [raw.encode(kv[f.first : f.first + f.layers], f) for f in forms]

    def _enter(self, key: Key, size: int) -> bool:
        """Enter a chunk in the ledger and drop what has to go for it."""
        with self._lock:
            victims = self._ledger.admit(key, size)
        self._evict(victims or [])
        return victims is not None

    def _evict(self, victims: list[Key]) -> None:
        for victim in victims:
            self._drop(victim)
            self._tell(Gone(victim))
        with self._lock:
            self._counts["evicted"] += len(victims)

    def _drop(self, key: Key) -> None:
        # How many parts it had is not remembered: one a layer is the most there can be.
        self._shelf.drop(key, 1 + self.geometry.layers)

    def _settle(self) -> None:
        """Take back what could not be written, and make room for the largest of it: a full disk looks just like this.

        Not for all of it: when many fail at once, what was written well would have to go for what was not.
        """
        failed = self._shelf.failed()
        with self._lock:
            # Who read it meanwhile, and found it lost, took it off the ledger.
            largest = max((max(lacking, self._ledger.size(key)) for key, lacking in failed.items()), default=0)
            for key in failed:
                self._ledger.forget(key)
            victims = self._ledger.give_up(largest)
            self._counts["unwritten"] += len(failed)
        for key in failed:
            self._drop(key)
            self._tell(Gone(key))
        self._evict(victims)
