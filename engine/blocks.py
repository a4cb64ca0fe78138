"""Which sequence holds which block of the pool, and which blocks are kept for those to come. No tensors.

A block is in one of three places:

- in use: in the table of at least one live sequence (its reference count says in how many);
- cached: in no table, but registered: full, and findable by the hash of its tokens and all tokens before them;
- free: neither.

Registered blocks are never written to, nor are shared ones: `reserve` replaces them by copies first. The copies are
collected for whoever owns the memory, who runs them, in order, before anything else of the step is written. (Repairs of
what chunks brought are the exception: they make a registered block that only one sequence holds less approximate, among
others that are approximate too.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass

from engine.hashing import chain, origin
from engine.sequence import Sequence


class Inconsistent(RuntimeError):
    """The books do not add up; the message says where. Always a mistake in this code."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive blocks that can be found from now on."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    """The block before them; None at the start of a prompt."""
    tokens: tuple[int, ...]
    """Of all these blocks, one after the other."""
    size: int
    """Tokens per block."""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These can no longer be found."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AllCleared:
    """Nothing can be found any more."""


BlockEvent = BlockStored | BlockRemoved | AllCleared


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a registered block holds."""

    hash: bytes
    parent: bytes | None
    tokens: tuple[int, ...]


_NEVER = 1 << 62
"""More blocks than any sequence has: what holds this many committed ones commits nothing further."""


class BlockManager:
    """The books of a pool of `total` blocks of `size` tokens each. One thread owns it."""

    def __init__(
        self,
        total: int,
        size: int,
        *,
        root: bytes,
        sink: Callable[[BlockEvent], None] | None = None,
        digest: Callable[[bytes, Row[int]], bytes] = chain,
    ) -> None:
        """`root` names all that keys and values depend on but tokens. `sink` hears of changes and must not block."""
        if total < 1 or size < 1:
            raise ValueError(f"a pool of {total} blocks of {size} tokens cannot hold anything")
        self.total, self.size = total, size
        self._root, self._sink, self._digest = root, sink, digest
        self._free = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """The cached blocks, the one to go first at the front."""
        self._refs = [0] * total
        self._entries: list[_Entry | None] = [None] * total
        self._index: dict[bytes, int] = {}
        self._coming: dict[bytes, Sequence] = {}
        """Blocks that will be known when a prompt now being computed is, and whose prompt."""
        self._live: set[Sequence] = set()
        self._copies: list[tuple[int, int]] = []
        self._removed: list[bytes] = []
        self.generation = 0
        """Grows whenever a block is registered or forgotten: until then a `lookup` holds."""
        self.prefix_queries = 0
        """Tokens of the prompts for which known blocks were looked for, …"""
        self.prefix_hits = 0
        """… and how many of them were found."""

    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    def cached(self) -> int:
        """Blocks that are only kept for sequences to come."""
        return len(self._idle)

    def used(self) -> int:
        """Blocks in tables of live sequences."""
        return self.total - len(self._free) - len(self._idle)

    def available(self) -> int:
        """Blocks that could be handed out: free or cached."""
        return len(self._free) + len(self._idle)

    def covering(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.size)

    def lookup(self, sequence: Sequence) -> int:
        """Leading tokens that need not be computed, were it admitted now. By hash alone; `admit` compares tokens."""
        known = 0
        for name in self._names(sequence) if _may_reuse(sequence) else ():
            if name not in self._index:
                break
            known += 1
        return min(known * self.size, len(sequence.tokens) - 1)

    def coming(self, sequence: Sequence, known: int) -> bool:
        """Whether the first block not known of it is being computed for another. `known`: from an earlier `lookup`."""
        if not _may_reuse(sequence):
            return False
        for name in self._names(sequence, known // self.size):
            if name not in self._index:
                return name in self._coming
        return False

    def admit(self, sequence: Sequence, *, spare: int = 0) -> bool:
        """Give it blocks for all its tokens, known ones where there are any, and set `computed` accordingly.

        At least the last token is left to compute. False, with nothing changed, if fewer than `spare` blocks would
        remain available.
        """
        known = self._match(sequence)
        computed = min(len(known) * self.size, len(sequence.tokens) - 1)
        if not self._attach(sequence, known[: self.covering(computed)], computed, spare):
            return False
        for name in self._names(sequence, sequence.committed):
            if name not in self._index:
                self._coming.setdefault(name, sequence)
        if not sequence.preemptions:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += computed
        return True

    def fork(self, parent: Sequence, child: Sequence, *, spare: int = 0) -> bool:
        """Give the child of the same prompt the parent's blocks, a partial one as a copy; otherwise like `admit`.

        Only the last token of the prompt is computed again. Raises ValueError if the parent has not computed it.
        """
        computed, full = len(child.tokens) - 1, len(child.tokens) // self.size
        if parent.computed < computed or parent not in self._live:
            raise ValueError("a parent is forked when its prompt is computed, and before it is released")
        if not self._attach(child, parent.table[: self.covering(computed)], computed, spare):
            return False
        if len(child.hashes) < full:
            child.hashes = parent.hashes[:full]
        if parent.committed == _NEVER:
            child.committed = _NEVER
        return True

    def reserve(self, sequence: Sequence, upto: int) -> bool:
        """Make the table cover `upto` tokens, and all of it from `computed` on writable. False: nothing changed."""
        table, refs, entries = sequence.table, self._refs, self._entries
        first, last = sequence.computed // self.size, -(-upto // self.size)
        if last <= len(table) and last == first + 1 and refs[table[first]] == 1 and entries[table[first]] is None:
            return True  # the usual decode
        wanted = max(0, last - len(table))
        copied = [
            place
            for place in range(first, min(last, len(table)))
            if refs[table[place]] > 1 or entries[table[place]] is not None
        ]
        # A registered block that only this sequence holds becomes available by being copied, so it costs none.
        if wanted + sum(refs[table[place]] > 1 for place in copied) > self.available():
            return False
        for place in copied:
            self._separate(table, place)
        for _ in range(wanted):
            table.append(self._take())
        self._tell_removed()
        return True

    def alone(self, sequence: Sequence, position: int) -> bool:
        """Whether no other live sequence holds the block of this token."""
        return self._refs[sequence.table[position // self.size]] == 1

    def commit(self, sequence: Sequence) -> None:
        """Register the blocks that became full of computed tokens. Those known already stay private to the sequence."""
        full, first = sequence.computed // self.size, sequence.committed
        if full <= first:
            return
        hashes = sequence.hashes
        for _, name in zip(range(first, full), self._names(sequence, first), strict=False):
            self._coming.pop(name, None)
        # Where others' equal blocks were known, and were forgotten since, its own take their place.
        while first and hashes[first - 1] not in self._index:
            first -= 1
        sequence.committed = full
        stored: list[int] = []
        for place in range(first, full):
            if hashes[place] not in self._index:
                self._register(sequence, place)
                stored.append(place)
            elif stored:
                self._tell_stored(sequence, stored)
                stored = []
        if stored:
            self._tell_stored(sequence, stored)

    def release(self, sequence: Sequence) -> None:
        """Take all its blocks from it; registered ones stay cached, the end of the prompt to be reused first."""
        for block in reversed(sequence.table):
            self._drop(block)
        for name in sequence.hashes[sequence.committed :]:
            if self._coming.get(name) is sequence:
                del self._coming[name]
        sequence.table, sequence.computed, sequence.committed = [], 0, 0
        self._live.discard(sequence)

    def clear(self) -> None:
        """Forget all that is known. What live sequences have computed so far is not offered again either."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._index.clear()
        self._coming.clear()
        self._entries = [None] * self.total
        for sequence in self._live:
            sequence.committed = _NEVER
        self.generation += 1
        if self._sink is not None:
            self._sink(AllCleared())

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies, (from, to), asked for since the last call.

        They run one after the other: one may read what an earlier one wrote, or overwrite what an earlier one read.
        They run before anything of the step is written, since their sources may have been handed out again.
        """
        copies, self._copies = self._copies, []
        return copies

    def check(self) -> None:
        """Hold tables, counts, lists and index against each other. Raises Inconsistent."""
        held = Counter(block for sequence in self._live for block in sequence.table)
        if (counts := {block: count for block, count in enumerate(self._refs) if count}) != held:
            raise Inconsistent(f"reference counts {counts} are not those of the tables {dict(held)}")
        places = Counter([*self._free, *self._idle, *held])
        if places != Counter(range(self.total)):
            raise Inconsistent(f"{len(self._free)} free + {len(self._idle)} cached + {len(held)} in use: {places}")
        registered = {entry.hash: block for block, entry in enumerate(self._entries) if entry is not None}
        if registered != self._index:
            raise Inconsistent("the index does not list the registered blocks")
        for block in self._free:
            if self._entries[block] is not None:
                raise Inconsistent(f"block {block} is free and registered")
        for block in self._idle:
            if self._entries[block] is None:
                raise Inconsistent(f"block {block} is cached and not registered")
        if not self._live.issuperset(self._coming.values()):
            raise Inconsistent("blocks are expected of a sequence that was released")
        for sequence in self._live:
            self._check_table(sequence)

    def _check_table(self, sequence: Sequence) -> None:
        if len(set(sequence.table)) != len(sequence.table):
            raise Inconsistent(f"a block is twice in the table {sequence.table}")
        if self.covering(sequence.computed) > len(sequence.table):
            raise Inconsistent(f"{sequence.computed} tokens are computed, the table is {sequence.table}")
        for place, block in enumerate(sequence.table):
            entry, start = self._entries[block], place * self.size
            if entry is not None and entry.tokens != tuple(sequence.tokens[start : start + self.size]):
                raise Inconsistent(f"block {block} is registered with other tokens than those of its sequence")

    def _names(self, sequence: Sequence, start: int = 0) -> Iterator[bytes]:
        """The hashes of its full blocks from `start` on, each computed when it is first asked for."""
        hashes, tokens, size = sequence.hashes, sequence.tokens, self.size
        for place in range(min(start, len(hashes)), len(tokens) // size):
            if place == len(hashes):
                parent = hashes[-1] if hashes else origin(self._root, sequence.tenant, sequence.salt)
                hashes.append(self._digest(parent, tokens[place * size : place * size + size]))
            if place >= start:
                yield hashes[place]

    def _match(self, sequence: Sequence) -> list[int]:
        """The registered blocks that hold its leading tokens."""
        blocks: list[int] = []
        parent: bytes | None = None
        for name in self._names(sequence) if _may_reuse(sequence) else ():
            block = self._index.get(name)
            if block is None:
                break
            start = len(blocks) * self.size
            entry, tokens = self._entries[block], tuple(sequence.tokens[start : start + self.size])
            # A hash is only a hint where to look.
            if entry is None or entry.parent != parent or entry.tokens != tokens:
                break
            blocks.append(block)
            parent = name
        return blocks

    def _attach(self, sequence: Sequence, blocks: list[int], computed: int, spare: int) -> bool:
        """Share these blocks and reserve the rest, or do nothing."""
        woken = [block for block in blocks if not self._refs[block]]
        wanted = self.covering(len(sequence.tokens)) - len(blocks)
        if computed < len(blocks) * self.size and self._refs[blocks[-1]]:
            wanted += 1  # the last one is copied, and stays with those who hold it
        if self.available() - len(woken) - wanted < spare:
            return False
        for block in blocks:
            self._refs[block] += 1
        for block in woken:
            del self._idle[block]
        sequence.table, sequence.computed, sequence.committed = list(blocks), computed, computed // self.size
        if not sequence.preemptions:
            sequence.cached = computed
        self._live.add(sequence)
        if not self.reserve(sequence, len(sequence.tokens)):
            raise Inconsistent("blocks that were counted as available are not")
        return True

    def _separate(self, table: list[int], place: int) -> None:
        """Make a block of a table writable."""
        source = table[place]
        if not self.available():
            # Only this sequence holds it (`reserve` has counted), and there is no room to keep it for others.
            self._forget(source)
            return
        table[place] = self._take()
        self._copies.append((source, table[place]))
        self._drop(source)

    def _take(self) -> int:
        """A block that nothing is known about, for one table; the one unused for longest where all are cached."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._refs[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if self._entries[block] is None:
            self._free.append(block)
        else:
            self._idle[block] = None

    def _register(self, sequence: Sequence, place: int) -> None:
        block, start, hashes = sequence.table[place], place * self.size, sequence.hashes
        tokens = tuple(sequence.tokens[start : start + self.size])
        self._entries[block] = _Entry(hashes[place], hashes[place - 1] if place else None, tokens)
        self._index[hashes[place]] = block
        self.generation += 1

    def _forget(self, block: int) -> None:
        entry = self._entries[block]
        if entry is None:
            raise Inconsistent(f"block {block} is to be forgotten and is not known")
        self._entries[block] = None
        del self._index[entry.hash]
        self._removed.append(entry.hash)
        self.generation += 1

    def _tell_stored(self, sequence: Sequence, places: list[int]) -> None:
        if self._sink is None:
            return
        first, after = places[0], places[-1] + 1
        hashes, tokens = sequence.hashes, sequence.tokens[first * self.size : after * self.size]
        self._sink(
            BlockStored(tuple(hashes[first:after]), hashes[first - 1] if first else None, tuple(tokens), self.size)
        )

    def _tell_removed(self) -> None:
        removed, self._removed = self._removed, []
        if removed and self._sink is not None:
            self._sink(BlockRemoved(tuple(removed)))


def _may_reuse(sequence: Sequence) -> bool:
    # The first drawn token shows that the whole prompt has been computed once.
    return not sequence.fresh or sequence.drawn > 0
