"""Attention through torch's scaled dot product: the backend for CPUs, and the plain twin of every other one.

Sequences with one new token are gathered into padded batches of similar length, one kernel call each; prompts go one
by one. A sequence whose blocks lie side by side is read in place.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import LayerPool, Packed
from engine.ops import padded

_STRETCH = 512
"""Positions that share a kernel call where a prompt's new tokens lie far apart: all of a call meet as many keys."""

_SMALL = 8
"""Up to this many blocks, decoding sequences share one batch: padding costs less than another call."""


@dataclass(frozen=True, slots=True, eq=False)
class _Keys:
    """Which keys some rows see: blocks to gather, or a run of tokens to read in place."""

    blocks: Tensor
    """int64 [B · M]."""
    run: slice | None = None
    """The same as slots of tokens, where a single sequence's blocks lie side by side."""
    skipped: int = 0
    """Leading tokens of the first block that are not wanted."""
    width: int = 0
    """Tokens per sequence, padding included."""


@dataclass(frozen=True, slots=True, eq=False)
class _Decodes:
    """Sequences with one new token each."""

    rows: Tensor | slice
    keys: _Keys
    mask: Tensor | None
    """[B, 1, 1, width], of `_mask`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """New tokens of one sequence that share a kernel call.

    Computed as so many rows and whole blocks of keys as `padded` says, which see nothing or are seen by nobody.
    """

    rows: slice
    """Of the sequence's."""
    missing: int
    """Rows that are added."""
    seen: slice
    """Of the sequence's keys."""
    mask: Tensor | None
    """[T + missing, width], of `_mask`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """Several new tokens of one sequence; without `keys` they are all there is, and plainly causal."""

    rows: slice
    keys: _Keys | None
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step for layers with the same window."""

    decodes: tuple[_Decodes, ...]
    prompts: tuple[_Prompt, ...]


class SdpaBackend:
    """See the module."""

    name = "sdpa"

    def __init__(self) -> None:
        self._scratch: list[Tensor] = []
        """Where keys and values are gathered, layer after layer; fresh memory would have to be mapped each time."""

    def plan(self, packed: Packed, window: int | None, block_size: int) -> Plan:
        """Sort the sequences into batches of decodes and single prompts."""
        ends = tuple(accumulate(packed.counts))
        groups: dict[int, list[int]] = defaultdict(list)
        prompts = []
        for index, (end, count, total) in enumerate(zip(ends, packed.counts, packed.totals, strict=True)):
            if count > 1 or total == 1:
                prompts.append(_prompt(packed, index, slice(end - count, end), window, block_size))
            else:
                seen = total if window is None else min(total, window)
                groups[max(-(-seen // block_size), _SMALL).bit_length()].append(index)
        decodes = tuple(_decodes(packed, members, ends, window, block_size) for members in groups.values())
        return Plan(decodes, tuple(prompts))

    def attend(self, queries: Tensor, pool: LayerPool, plan: Plan, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """[N, H, D] to [N, H, D]."""
        # Several pieces are written into one result; a single one is the result.
        out = torch.empty_like(queries) if len(plan.decodes) + len(plan.prompts) > 1 else None
        for group in plan.decodes:
            seen = self._decode(queries[group.rows], pool, group)
            if out is None:
                return seen
            out[group.rows] = seen
        for prompt in plan.prompts:
            seen = self._prefill(queries[prompt.rows], pool, prompt, fresh)
            if out is None:
                return seen
            out[prompt.rows] = seen
        assert out is not None
        return out

    def _decode(self, queries: Tensor, pool: LayerPool, group: _Decodes) -> Tensor:
        """[B, H, D] to [B, H, D]. The heads of a group become the query axis, so that keys are not repeated."""
        batch, heads, dim = queries.shape
        keys, values = self._gather(pool, group.keys, batch)
        folded = queries.reshape(batch, keys.shape[1], -1, dim)
        seen = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=group.mask)
        return seen.reshape(batch, heads, dim)

    def _prefill(self, queries: Tensor, pool: LayerPool, prompt: _Prompt, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """[T, H, D] to [T, H, D]."""
        if prompt.keys is None:
            more = (0, 0, 0, 0, 0, prompt.parts[0].missing)
            keys, values = (functional.pad(part[prompt.rows], more).transpose(0, 1)[None] for part in fresh)
        else:
            keys, values = self._gather(pool, prompt.keys, 1)
        seen = [
            _attended(queries[part.rows], keys[:, :, part.seen], values[:, :, part.seen], part) for part in prompt.parts
        ]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def _gather(self, pool: LayerPool, keys: _Keys, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, K, width, D]; valid until the next call."""
        tail = pool.keys.shape[2:]
        if keys.run is not None:
            in_place = [part.view(1, -1, *tail)[:, keys.run].transpose(1, 2) for part in (pool.keys, pool.values)]
            return in_place[0], in_place[1]
        count = len(keys.blocks)
        if not self._scratch or self._scratch[0].shape[0] < count or self._scratch[0].dtype != pool.keys.dtype:
            size = 1 << (count - 1).bit_length()
            self._scratch = [pool.keys.new_empty((size, *pool.keys.shape[1:])) for _ in range(2)]
        gathered = []
        for part, scratch in zip((pool.keys, pool.values), self._scratch, strict=True):
            found = torch.index_select(part, 0, keys.blocks, out=scratch[:count]).view(batch, -1, *tail)
            gathered.append(found[:, keys.skipped : keys.skipped + keys.width].transpose(1, 2))
        return gathered[0], gathered[1]


def _attended(queries: Tensor, keys: Tensor, values: Tensor, part: _Part) -> Tensor:
    """[T, H, D] to [T, H, D], over keys and values [1, K, S, D]."""
    seen = functional.scaled_dot_product_attention(
        functional.pad(queries, (0, 0, 0, 0, 0, part.missing)).transpose(0, 1)[None],
        keys,
        values,
        attn_mask=part.mask,
        is_causal=part.mask is None,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return seen[0].transpose(0, 1)[: len(queries)].contiguous()


def _decodes(
    packed: Packed, members: list[int], ends: tuple[int, ...], window: int | None, block_size: int
) -> _Decodes:
    """Plan sequences `members`, whose tokens are rows `ends[m] - 1`."""
    rows: Tensor | slice = slice(ends[members[0]] - 1, ends[members[-1]])
    if ends[members[-1]] - ends[members[0]] != len(members) - 1:
        rows = torch.tensor([ends[member] - 1 for member in members], device=packed.ids.device)
    totals = [packed.totals[member] for member in members]
    if len(members) == 1:
        first = 0 if window is None else max(0, totals[0] - window)
        return _Decodes(rows, _keys(packed.tables[members[0]], first, totals[0], block_size), None)
    lengths = torch.tensor(totals, device=packed.ids.device)[:, None]
    # With a window only its blocks are gathered, which start elsewhere in every sequence.
    first_blocks = torch.zeros_like(lengths) if window is None else (lengths - window).clamp(min=0) // block_size
    columns = max(-(-total // block_size) - _first_block(total, window, block_size) for total in totals)
    chosen = first_blocks + torch.arange(columns, device=lengths.device)
    table = packed.tables[members].long()
    blocks = table.gather(1, chosen.clamp(max=table.shape[1] - 1)).flatten()
    width = columns * block_size
    positions = first_blocks * block_size + torch.arange(width, device=lengths.device)
    seen = positions < lengths
    if window is not None:
        seen &= positions >= lengths - window
    return _Decodes(rows, _Keys(blocks, width=width), _mask(seen[:, None, None]))


def _first_block(total: int, window: int | None, block_size: int) -> int:
    return 0 if window is None else max(0, total - window) // block_size


def _prompt(packed: Packed, index: int, rows: slice, window: int | None, block_size: int) -> _Prompt:
    count, total = packed.counts[index], packed.totals[index]
    if count == total and (window is None or total <= window):
        missing = padded(count) - count
        return _Prompt(rows, None, (_Part(slice(0, count), missing, slice(0, count + missing), None),))
    begin = total - count if packed.firsts is None else packed.firsts[index]
    first = 0 if window is None else max(0, begin - window + 1)
    first, last = first // block_size * block_size, -(-total // block_size) * block_size
    positions = packed.positions[rows]
    parts = []
    for start, stop in _stretches(positions, begin, total):
        # To whole blocks, for the kernel's sake.
        end = total if stop == count else int(positions[stop - 1]) + 1
        seen = slice(0, min(last, -(-end // block_size) * block_size) - first)
        parts.append(_part(positions[start:stop], slice(start, stop), first, seen, window))
    return _Prompt(rows, _keys(packed.tables[index], first, last, block_size), tuple(parts))


def _part(positions: Tensor, rows: slice, first: int, seen: slice, window: int | None) -> _Part:
    """Tokens at these positions, which are those `rows`, over the keys from `first` on."""
    missing = padded(len(positions)) - len(positions)
    # Rows that are added see everything: seeing nothing would make them NaN.
    if window is None and positions.device.type == "cpu":
        # All see what lies before the first of them, most of it in a long prompt; making no mask of that saves time.
        mask, known = torch.zeros(len(positions) + missing, seen.stop), int(positions[0]) - first
        later = torch.arange(first + known, first + seen.stop) > positions[:, None]
        mask[: len(positions), known:].masked_fill_(later, float("-inf"))
        return _Part(rows, missing, seen, mask)
    distance = positions[:, None] - torch.arange(first, first + seen.stop, device=positions.device)
    near = distance >= 0
    if window is not None:
        near &= distance < window
    return _Part(rows, missing, seen, _mask(functional.pad(near, (0, 0, 0, missing), value=True)))


def _stretches(positions: Tensor, begin: int, total: int) -> list[tuple[int, int]]:
    """How rows at these ascending positions, from `begin` to `total`, are shared out among kernel calls."""
    count = len(positions)
    # Looking at them would have to wait for a GPU, and tokens side by side see almost the same.
    if positions.device.type != "cpu" or total - begin <= max(2 * count, _STRETCH):
        return [(0, count)]
    found = torch.searchsorted(positions, torch.arange(begin, total, _STRETCH)).tolist()
    cuts = [cut for cut in sorted(set(found)) if cut < count]
    return list(zip(cuts, [*cuts[1:], count], strict=True))


def _mask(seen: Tensor) -> Tensor:
    """What the kernel adds to the scores, or on a GPU, which takes no other dtype than the queries', what it lets pass.

    Told what to let pass, the CPU's kernel makes this of it, and would in every layer.
    """
    if seen.device.type != "cpu":
        return seen
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _keys(table: Tensor, first: int, total: int, block_size: int) -> _Keys:
    """Tokens `first` to `total` of one sequence with this row of the table."""
    start = first // block_size
    blocks = table[start : -(-total // block_size)].long()
    skipped, width, begin = first - start * block_size, total - first, int(blocks[0])
    in_place = torch.equal(blocks, torch.arange(begin, begin + len(blocks), device=blocks.device))
    at = begin * block_size + skipped
    return _Keys(blocks, slice(at, at + width) if in_place else None, skipped, width)
