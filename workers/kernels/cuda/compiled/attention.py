"""Causal attention over the paged cache: the same sums for a row whether it decodes or is part of a prompt.

A context is cut into splits of SPLIT keys, a split into steps of BJ keys, both counted from key 0. Within a split the
softmax runs on ("Online normalizer calculation for softmax", Milakov and Gimelshein, 2018); the splits are merged in
order. Sums over keys are matrix products, whose order of addition does not depend on the number of rows; keys that a
row must not see add exact zeros.

Legend: T token rows, H query heads, G key/value heads, d head size, C cache blocks of Z rows, S sequences, B blocks a
sequence, R rows that decode, I items: (row, split).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(q, k, v, seen, scale, top, total, acc):
    """Add BJ keys to a running softmax: `top` the largest product so far, `total` [.., 16] the sum of weights."""
    raw = tl.where(seen, tl.dot(q, tl.trans(k)), float("-inf"))
    highest = tl.maximum(top, tl.max(raw, 1))
    finite = tl.where(highest == float("-inf"), 0.0, highest) * scale
    p = tl.exp2(tl.fma(raw, scale, -finite[:, None])).to(v.dtype)
    shrink = tl.exp2(tl.fma(top, scale, -finite))
    ones = tl.full([v.shape[0], 16], 1.0, v.dtype)
    total = tl.dot(p, ones, total * shrink[:, None])
    acc = tl.dot(p, v, acc * shrink[:, None])
    return highest, total, acc


@triton.jit
def merge(all_top, all_total, all_acc, top, total, acc, scale):
    """The next split, [N] and [N, d], to those before it."""
    highest = tl.maximum(all_top, top)
    finite = tl.where(highest == float("-inf"), 0.0, highest) * scale
    shrink, its = tl.exp2(tl.fma(all_top, scale, -finite)), tl.exp2(tl.fma(top, scale, -finite))
    all_acc = tl.fma(acc, its[:, None], all_acc * shrink[:, None])
    all_total = tl.fma(total, its, all_total * shrink)
    return highest, all_total, all_acc


@triton.jit
def items_kernel(
    row_ptr,  # int32 [R]: the rows that decode, with ROWS; else row r is r
    sequence_ptr,  # int64 [T]
    position_ptr,  # int64 [T]: -1: the row is padding
    base_ptr,  # out int32 [R + 1]: the first item of each row, and the number of items
    item_ptr,  # out int32 [I, 4]: row among the R, first key, sequence, position
    R,
    WINDOW: tl.constexpr,  # keys a row sees; 0: all before it
    SPLIT: tl.constexpr,
    R2: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: which splits there are, by row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    r = tl.arange(0, R2)
    row = r
    if ROWS:
        row = tl.load(row_ptr + r, mask=r < R, other=0)
    position = tl.load(position_ptr + row, mask=r < R, other=-1).to(tl.int32)
    sequence = tl.load(sequence_ptr + row, mask=r < R, other=0).to(tl.int32)
    first = tl.zeros_like(position)
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0) // SPLIT
    count = tl.where(position >= 0, position // SPLIT - first + 1, 0)
    end = tl.cumsum(count, 0)
    base = end - count
    tl.store(base_ptr + r, base, mask=r < R)
    tl.store(base_ptr + R, tl.sum(count, 0))
    for i in range(tl.max(count, 0)):
        at = item_ptr + (base + i) * 4
        mine = i < count
        tl.store(at, r, mask=mine)
        tl.store(at + 1, (first + i) * SPLIT, mask=mine)
        tl.store(at + 2, sequence, mask=mine)
        tl.store(at + 3, position, mask=mine)


@triton.jit(do_not_specialize=["R", "B"])
def decode_kernel(
    q_ptr,  # [T, H, d]
    k_cache_ptr,  # [C, Z, G, d]
    v_cache_ptr,
    table_ptr,  # int32 [S, B]
    row_ptr,  # int32 [R], with ROWS
    base_ptr,  # int32 [R + 1]
    item_ptr,  # int32 [I, 4]
    out_ptr,  # out [T, H, d], of rows with one split
    part_ptr,  # out float32 [I, H, d]: the sum over a split, not divided
    stat_ptr,  # out float32 [I, H, 2]: its largest product and its divisor
    scale,  # of the products, times log2(e)
    R,
    B,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    D2: tl.constexpr,
    HG2: tl.constexpr,
    Z: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BJ: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The H / G query heads that share a key/value head, over the items that are this program's turn."""
    g = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    n_items = tl.load(base_ptr + R)
    head, c = tl.arange(0, HG2), tl.arange(0, D2)
    is_head = head < H // G
    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        r, begin = tl.load(item_ptr + item * 4), tl.load(item_ptr + item * 4 + 1)
        sequence, position = tl.load(item_ptr + item * 4 + 2), tl.load(item_ptr + item * 4 + 3)
        row = r
        if ROWS:
            row = tl.load(row_ptr + r)
        at_head = row.to(tl.int64) * H + g * (H // G) + head
        q_mask = is_head[:, None] & (c < d)[None, :]
        q = tl.load(q_ptr + at_head[:, None] * d + c[None, :], mask=q_mask, other=0.0)
        top, total = tl.full([HG2], float("-inf"), tl.float32), tl.zeros([HG2, 16], tl.float32)
        acc = tl.zeros([HG2, D2], tl.float32)
        for start in range(begin, tl.minimum(begin + SPLIT, position + 1), BJ):
            key = start + tl.arange(0, BJ)
            is_key = key <= position
            if WINDOW > 0:
                is_key = is_key & (key > position - WINDOW)
            block = tl.load(table_ptr + sequence.to(tl.int64) * B + key // Z, mask=is_key, other=0).to(tl.int64)
            at = ((block * Z + key % Z) * G + g)[:, None] * d + c[None, :]
            kv_mask = is_key[:, None] & (c < d)[None, :]
            k = tl.load(k_cache_ptr + at, mask=kv_mask, other=0.0)
            v = tl.load(v_cache_ptr + at, mask=kv_mask, other=0.0)
            top, total, acc = step(q, k, v, is_key[None, :], scale, top, total, acc)
        divisor = tl.max(total, 1)  # all columns are equal
        if tl.load(base_ptr + r + 1) - tl.load(base_ptr + r) == 1:
            out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at_head[:, None] * d + c[None, :], out, mask=q_mask)
        else:
            at_part = (item * H + g * (H // G) + head).to(tl.int64)
            tl.store(part_ptr + at_part[:, None] * d + c[None, :], acc, mask=q_mask)
            tl.store(stat_ptr + at_part * 2, top, mask=is_head)
            tl.store(stat_ptr + at_part * 2 + 1, divisor, mask=is_head)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def merge_kernel(
    part_ptr, stat_ptr, base_ptr, row_ptr, out_ptr, scale, H: tl.constexpr, d: tl.constexpr, D2: tl.constexpr,
    HM: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HM query heads of one row that decodes: its splits, in order. A row of one split is there already."""
    r, h, c = tl.program_id(0), tl.program_id(1) * HM + tl.arange(0, HM), tl.arange(0, D2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    begin, end = tl.load(base_ptr + r), tl.load(base_ptr + r + 1)
    if end - begin < 2:
        return
    top, total = tl.full([HM], float("-inf"), tl.float32), tl.zeros([HM], tl.float32)
    acc = tl.zeros([HM, D2], tl.float32)
    inside = (h < H)[:, None] & (c < d)[None, :]
    for item in range(begin, end):
        at = (item * H + h).to(tl.int64)
        part = tl.load(part_ptr + at[:, None] * d + c[None, :], mask=inside, other=0.0)
        its_top = tl.load(stat_ptr + at * 2, mask=h < H, other=0.0)
        its_total = tl.load(stat_ptr + at * 2 + 1, mask=h < H, other=1.0)
        top, total, acc = merge(top, total, acc, its_top, its_total, part, scale)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = r
    if ROWS:
        row = tl.load(row_ptr + r)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * H + h).to(tl.int64)[:, None] * d + c[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["B"])
def prefill_kernel(
    q_ptr,  # [T, H, d]
    k_cache_ptr,  # [C, Z, G, d]
    v_cache_ptr,
    table_ptr,  # int32 [S, B]
    sequence_ptr,  # int64 [T]
    position_ptr,  # int64 [T]
    tile_ptr,  # int32 [tiles, 2]: first row and number of rows, all of one sequence
    out_ptr,  # out [T, H, d]
    scale,
    B,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    D2: tl.constexpr,
    HG2: tl.constexpr,
    Z: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BJ: tl.constexpr,
    BM: tl.constexpr,
):
    """BM / HG2 rows of one sequence by the H / G query heads that share a key/value head."""
    g, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # the longest contexts first
    first_row, n_rows = tl.load(tile_ptr + tile * 2), tl.load(tile_ptr + tile * 2 + 1)
    first = tl.load(position_ptr + first_row).to(tl.int32)
    table_at = table_ptr + tl.load(sequence_ptr + first_row) * B
    m, c = tl.arange(0, BM), tl.arange(0, D2)
    r, head = m // HG2, m % HG2
    position = first + r
    is_m = (r < n_rows) & (head < H // G)
    at_head = (first_row + r).to(tl.int64) * H + g * (H // G) + head
    q_mask = is_m[:, None] & (c < d)[None, :]
    q = tl.load(q_ptr + at_head[:, None] * d + c[None, :], mask=q_mask, other=0.0)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM, 16], tl.float32)
    acc = tl.zeros([BM, D2], tl.float32)
    all_top, all_total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    all_acc = tl.zeros([BM, D2], tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first + 1 - WINDOW, 0) // SPLIT * SPLIT
    last = first + n_rows
    for start in range(begin, last, BJ):
        key = start + tl.arange(0, BJ)
        is_key = key < last
        block = tl.load(table_at + key // Z, mask=is_key, other=0).to(tl.int64)
        at = ((block * Z + key % Z) * G + g)[:, None] * d + c[None, :]
        kv_mask = is_key[:, None] & (c < d)[None, :]
        k = tl.load(k_cache_ptr + at, mask=kv_mask, other=0.0)
        v = tl.load(v_cache_ptr + at, mask=kv_mask, other=0.0)
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        top, total, acc = step(q, k, v, seen, scale, top, total, acc)
        if ((start + BJ) % SPLIT == 0) | (start + BJ >= last):
            all_top, all_total, all_acc = merge(all_top, all_total, all_acc, top, tl.max(total, 1), acc, scale)
            top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM, 16], tl.float32)
            acc = tl.zeros([BM, D2], tl.float32)
    out = (all_acc / tl.maximum(all_total, 1e-30)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at_head[:, None] * d + c[None, :], out, mask=q_mask)
