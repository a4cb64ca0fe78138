"""The Triton kernels: paged attention for prompts and for decoding, and the small steps between matrix products.

Not type-checked (this language is Triton's, not Python's); `engine.attention.triton` and `engine.fused` launch them
and give the shapes. Set TRITON_INTERPRET=1 before the first import to run them without a GPU.

Strides of tables and numbers of splits change from step to step, so nothing is compiled anew for them; what is a
`constexpr` is fixed for a model.
"""

# ruff: noqa: SIM102, SIM108
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _walk(
    acc,
    best,
    total,
    queries,
    positions,
    keys,
    values,
    table,
    begin,
    end,
    scale,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax of queries [M, BLOCK_D] over the keys at positions `begin` to `end` of one sequence and head.

    Without MASKED every query sees all of them, and `end - begin` is a multiple of BLOCK_N. `scale` includes log2(e).
    """
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        if MASKED:
            blocks = tl.load(table + at // SIZE, mask=at < end, other=0)
        else:
            blocks = tl.load(table + at // SIZE)
        # In 64 bits: a pool has more than 2³¹ elements.
        offsets = (blocks.to(tl.int64) * SIZE + at % SIZE)[:, None] * ROW + dims[None, :]
        if MASKED or DIM != BLOCK_D:
            wanted = (at < end)[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + offsets, mask=wanted, other=0.0)
            v = tl.load(values + offsets, mask=wanted, other=0.0)
        else:
            k = tl.load(keys + offsets)
            v = tl.load(values + offsets)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            seen = (at < end)[None, :] & (at[None, :] <= positions[:, None])
            if WINDOW > 0:
                seen = seen & (positions[:, None] - at[None, :] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        best_now = tl.maximum(best, tl.max(scores, 1))
        if MASKED:
            # A query that has seen nothing yet: minus infinity minus itself would not be a number.
            level = tl.where(best_now == float("-inf"), 0.0, best_now)
        else:
            level = best_now
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(best - level)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = best_now
    return acc, best, total


@triton.jit(do_not_specialize=["stride_table"])
def prefill(
    queries,
    keys,
    values,
    out,
    positions,
    starts,
    tables,
    tiles,
    scale,
    stride_table,
    STRIDE_Q: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    ROW: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One key/value head and one tile of tokens of one sequence, with all query heads of the group as its rows."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    stop = tl.load(starts + sequence + 1)
    lanes = tl.arange(0, BLOCK_M)
    rows = first + lanes // PADDED
    members = lanes % PADDED
    valid = (rows < stop) & (members < GROUP)
    # Lanes without a token repeat the last one, so that they do not widen the range of keys.
    rows = tl.minimum(rows, stop - 1)
    where = tl.load(positions + rows).to(tl.int32)
    lowest = tl.min(where, 0)
    highest = tl.max(where, 0)
    dims = tl.arange(0, BLOCK_D)
    heads = head * GROUP + members
    q_mask = valid[:, None] & (dims < DIM)[None, :]
    q_offsets = rows.to(tl.int64)[:, None] * STRIDE_Q + heads[:, None] * DIM + dims[None, :]
    q = tl.load(queries + q_offsets, mask=q_mask, other=0.0)

    table = tables + sequence.to(tl.int64) * stride_table
    own_keys = keys + head * DIM
    own_values = values + head * DIM
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Tiles of keys that every lane sees whole need no mask: from `inner` to `outer`.
    begin = 0
    inner = 0
    outer = (lowest + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        outer = tl.maximum(outer, begin)
        inner = tl.maximum(highest - WINDOW + 1, begin)
        inner = tl.minimum((inner + BLOCK_N - 1) // BLOCK_N * BLOCK_N, outer)
        acc, best, total = _walk(
            acc, best, total, q, where, own_keys, own_values, table, begin, inner, scale,
            ROW, SIZE, DIM, WINDOW, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, best, total = _walk(
        acc, best, total, q, where, own_keys, own_values, table, inner, outer, scale,
        ROW, SIZE, DIM, WINDOW, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, best, total = _walk(
        acc, best, total, q, where, own_keys, own_values, table, outer, highest + 1, scale,
        ROW, SIZE, DIM, WINDOW, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out_offsets = rows.to(tl.int64)[:, None] * STRIDE_OUT + heads[:, None] * DIM + dims[None, :]
    tl.store(out + out_offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["stride_table", "splits"])
def decode(
    queries,
    keys,
    values,
    out,
    partial,
    levels,
    lengths,
    starts,
    tables,
    members,
    scale,
    stride_table,
    splits,
    STRIDE_Q: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    ROW: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One sequence with one new token, one key/value head, one of `splits` stretches of its keys.

    WHOLE: there is one stretch, and the result goes to `out`; else to `partial` float32 [sequences, heads, splits,
    DIM] with log2 of its weight in `levels` [sequences, heads, splits], for `reduce`.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(members + index)
    length = tl.load(lengths + sequence)
    lanes = tl.arange(0, BLOCK_M)
    heads = head * GROUP + lanes
    piece = (index.to(tl.int64) * (tl.num_programs(1) * GROUP) + heads) * splits + split
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    span = (length - begin + splits - 1) // splits
    span = (span + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin += split * span
    end = tl.minimum(begin + span, length)
    if not WHOLE:
        if begin >= end:
            # Splits were planned for a longer sequence.
            tl.store(levels + piece, tl.full([BLOCK_M], float("-inf"), dtype=tl.float32), mask=lanes < GROUP)
            return
    even = begin + (end - begin) // BLOCK_N * BLOCK_N
    row = tl.load(starts + sequence).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = (lanes < GROUP)[:, None] & (dims < DIM)[None, :]
    q = tl.load(queries + row * STRIDE_Q + heads[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    where = tl.zeros([BLOCK_M], dtype=tl.int32) + (length - 1)
    table = tables + sequence.to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, best, total = _walk(
        acc, best, total, q, where, keys + head * DIM, values + head * DIM, table, begin, even, scale,
        ROW, SIZE, DIM, 0, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, best, total = _walk(
        acc, best, total, q, where, keys + head * DIM, values + head * DIM, table, even, end, scale,
        ROW, SIZE, DIM, 0, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    seen = acc / total[:, None]
    if WHOLE:
        offsets = row * STRIDE_OUT + heads[:, None] * DIM + dims[None, :]
        tl.store(out + offsets, seen.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + piece[:, None] * DIM + dims[None, :], seen, mask=mask)
        tl.store(levels + piece, best + tl.log2(total), mask=lanes < GROUP)


@triton.jit(do_not_specialize=["splits"])
def reduce(
    partial,
    levels,
    out,
    starts,
    members,
    splits,
    STRIDE_OUT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST: tl.constexpr,
):
    """Add up the stretches that `decode` left, for one sequence and one query head."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(starts + tl.load(members + index)).to(tl.int64)
    piece = (index.to(tl.int64) * tl.num_programs(1) + head) * splits + tl.arange(0, MOST)
    there = tl.arange(0, MOST) < splits
    dims = tl.arange(0, BLOCK_D)
    level = tl.load(levels + piece, mask=there, other=float("-inf"))
    weights = tl.exp2(level - tl.max(level, 0))
    # What weighs nothing is not read: batches are often split for sequences much longer than most.
    mask = (weights > 0.0)[:, None] & (dims < DIM)[None, :]
    parts = tl.load(partial + piece[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    seen = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * STRIDE_OUT + head * DIM + dims, seen.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit
def add_norm(x, delta, weight, summed, normed, eps, SIZE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row: x + delta, and its root mean square norm."""
    row = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    value = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + at, mask=inside, other=0.0).to(tl.float32)
        # The norm is of what the next layer will read, so rounding comes first.
        value = value.to(summed.dtype.element_ty)
        tl.store(summed + row + at, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + at, (value * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def turn_write(
    mixed,
    cos,
    sin,
    slots,
    keys,
    values,
    query_norm,
    key_norm,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
):
    """Some heads of one token: normalise and turn queries and keys in place, put keys and values into the pool."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, HALF)
    inside = (heads < HEADS + 2 * KV_HEADS)[:, None] & (dims < DIM // 2)[None, :]
    turning = (heads < HEADS + KV_HEADS)[:, None]
    at = mixed + (token * (HEADS + 2 * KV_HEADS) + heads[:, None]) * DIM + dims[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    angles = token * DIM + dims
    # The first half of the sines is negated for the plain rotation; the second is as it is.
    c = tl.load(cos + angles, mask=dims < DIM // 2, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + angles + DIM // 2, mask=dims < DIM // 2, other=0.0).to(tl.float32)[None, :]
    if NORM:
        square = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM
        scale = tl.rsqrt(square + eps)[:, None]
        is_query = (heads < HEADS)[:, None]
        gains = tl.where(is_query, query_norm + dims[None, :], key_norm + dims[None, :])
        normed_low = low * scale * tl.load(gains, mask=inside, other=0.0).to(tl.float32)
        normed_high = high * scale * tl.load(gains + DIM // 2, mask=inside, other=0.0).to(tl.float32)
        low = tl.where(turning, normed_low, low)
        high = tl.where(turning, normed_high, high)
    turned_low = tl.where(turning, low * c - high * s, low).to(mixed.dtype.element_ty)
    turned_high = tl.where(turning, high * c + low * s, high).to(mixed.dtype.element_ty)
    tl.store(at, turned_low, mask=inside & turning)
    tl.store(at + DIM // 2, turned_high, mask=inside & turning)
    slot = tl.load(slots + token)
    key_at = keys + (slot * KV_HEADS + heads[:, None] - HEADS) * DIM + dims[None, :]
    is_key = inside & (heads >= HEADS)[:, None] & turning
    tl.store(key_at, turned_low, mask=is_key)
    tl.store(key_at + DIM // 2, turned_high, mask=is_key)
    value_at = values + (slot * KV_HEADS + heads[:, None] - HEADS - KV_HEADS) * DIM + dims[None, :]
    is_value = inside & (heads >= HEADS + KV_HEADS)[:, None]
    tl.store(value_at, turned_low, mask=is_value)
    tl.store(value_at + DIM // 2, turned_high, mask=is_value)


@triton.jit
def gate(both, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) · up for a stretch of one row of [N, 2 · SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    half = both + row * 2 * SIZE
    opening = tl.load(half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(half + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    # As the plain version does, the gate is rounded before it is multiplied.
    opened = (opening / (1.0 + tl.exp(-opening))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + at, (opened * up).to(out.dtype.element_ty), mask=inside)
