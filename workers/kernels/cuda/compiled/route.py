"""From each pair's expert to row blocks: a counting sort, stable, so that the order depends on the ids alone.

Legend: P pairs, E experts, M row blocks of at most BM pairs of one expert, C chunks of pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_blocks(first_E, end_E, blocks_E, slot_E, block_ptr, M, begin, M2: tl.constexpr, BM: tl.constexpr):
    """Slot, first row and end row of the row blocks begin ... begin + M2 - 1; slot -1: no such block."""
    block_end_E = tl.cumsum(blocks_E, 0)
    block_first_E = block_end_E - blocks_E
    block = begin + tl.arange(0, M2)
    mine = ((block[:, None] >= block_first_E[None, :]) & (block[:, None] < block_end_E[None, :])).to(tl.int32)
    slot = tl.sum(mine * (slot_E + 1)[None, :], 1) - 1
    first = tl.sum(mine * (first_E[None, :] + (block[:, None] - block_first_E[None, :]) * BM), 1)
    end = tl.minimum(tl.sum(mine * end_E[None, :], 1), first + BM)
    tl.store(block_ptr + block, slot, mask=block < M)
    tl.store(block_ptr + M + block, first, mask=block < M)
    tl.store(block_ptr + 2 * M + block, end, mask=block < M)


@triton.jit(do_not_specialize=["P", "M"])
def route_kernel(
    ids_ptr,  # [P]: the expert of each pair; outside 0 ... E - 1: nobody's
    slot_ptr,  # int32 [E]: the slot that holds the expert, -1: not here
    order_ptr,  # out int32 [P]: pairs ascending by (expert, pair)
    place_ptr,  # out int32 [P]: where each pair is in `order`; -1: its expert is not here
    block_ptr,  # out int32 [3, M]
    count_ptr,  # int64 [E]: the pairs of each expert are added to it
    P,
    M,
    E: tl.constexpr,
    E2: tl.constexpr,
    P2: tl.constexpr,
    M2: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    """All of it in one program, for few pairs."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    pair, expert = tl.arange(0, P2), tl.arange(0, E2)
    slot_E = tl.load(slot_ptr + expert, mask=expert < E, other=-1)
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1).to(tl.int32)
    known_E = tl.load(count_ptr + expert, mask=expert < E, other=0)
    is_its = ((ids[:, None] == expert[None, :]) & (slot_E >= 0)[None, :]).to(tl.int32)
    rank = tl.sum(is_its * (tl.cumsum(is_its, 0) - 1), 1)
    count_E = tl.sum(is_its, 0)
    end_E = tl.cumsum(count_E, 0)
    first_E = end_E - count_E
    here = tl.sum(is_its, 1) > 0
    place = tl.sum(is_its * first_E[None, :], 1) + rank
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(place_ptr + pair, tl.where(here, place, -1), mask=pair < P)
    tl.store(order_ptr + place, pair, mask=here)
    write_blocks(first_E, end_E, (count_E + BM - 1) // BM, slot_E, block_ptr, M, 0, M2, BM)
    tl.store(count_ptr + expert, known_E + count_E, mask=expert < E)


@triton.jit(do_not_specialize=["P"])
def count_kernel(ids_ptr, slot_ptr, chunk_ptr, P, E: tl.constexpr, E2: tl.constexpr, CHUNK: tl.constexpr):
    """Many pairs, first: how many pairs of each expert a chunk has, int32 [C, E2]."""
    chunk = tl.program_id(0)
    pair, expert = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, E2)
    slot_E = tl.load(slot_ptr + expert, mask=expert < E, other=-1)
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1).to(tl.int32)
    is_its = ((ids[:, None] == expert[None, :]) & (slot_E >= 0)[None, :]).to(tl.int32)
    tl.store(chunk_ptr + chunk * E2 + expert, tl.sum(is_its, 0))


@triton.jit(do_not_specialize=["C", "M"])
def scan_kernel(
    chunk_ptr,  # in and out int32 [C, E2]: counts, then where each chunk's pairs of each expert begin
    slot_ptr,
    block_ptr,
    count_ptr,
    C,
    M,
    E: tl.constexpr,
    E2: tl.constexpr,
    C2: tl.constexpr,
    M2: tl.constexpr,
    BM: tl.constexpr,
):
    """Many pairs, second: one program adds the chunks up and writes the row blocks."""
    expert = tl.arange(0, E2)
    count_E = tl.zeros([E2], tl.int32)
    for begin in range(0, C, C2):
        chunk = begin + tl.arange(0, C2)
        at = chunk_ptr + chunk[:, None] * E2 + expert[None, :]
        counts = tl.load(at, mask=(chunk < C)[:, None], other=0)
        tl.store(at, count_E[None, :] + tl.cumsum(counts, 0) - counts, mask=(chunk < C)[:, None])
        count_E += tl.sum(counts, 0)
    end_E = tl.cumsum(count_E, 0)
    first_E = end_E - count_E
    slot_E = tl.load(slot_ptr + expert, mask=expert < E, other=-1)
    for begin in range(0, M, M2):
        write_blocks(first_E, end_E, (count_E + BM - 1) // BM, slot_E, block_ptr, M, begin, M2, BM)
    tl.store(chunk_ptr + C * E2 + expert, first_E)
    known = tl.load(count_ptr + expert, mask=expert < E, other=0)
    tl.store(count_ptr + expert, known + count_E, mask=expert < E)


@triton.jit(do_not_specialize=["P", "C"])
def place_kernel(
    ids_ptr, slot_ptr, chunk_ptr, order_ptr, place_ptr, P, C, E: tl.constexpr, E2: tl.constexpr, CHUNK: tl.constexpr
):
    """Many pairs, third: each pair to its place. `chunk_ptr`: as `scan_kernel` left it, row C: where experts begin."""
    chunk = tl.program_id(0)
    pair, expert = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, E2)
    slot_E = tl.load(slot_ptr + expert, mask=expert < E, other=-1)
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1).to(tl.int32)
    is_its = ((ids[:, None] == expert[None, :]) & (slot_E >= 0)[None, :]).to(tl.int32)
    begin_E = tl.load(chunk_ptr + chunk * E2 + expert) + tl.load(chunk_ptr + C * E2 + expert)
    place = tl.sum(is_its * (begin_E[None, :] + tl.cumsum(is_its, 0) - 1), 1)
    here = tl.sum(is_its, 1) > 0
    tl.store(place_ptr + pair, tl.where(here, place, -1), mask=pair < P)
    tl.store(order_ptr + place, pair, mask=here)


@triton.jit
def gather_kernel(
    x_ptr,  # [T, D]
    place_ptr,  # int32 [P]
    rows_ptr,  # out [P, D]
    D: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
):
    """The row of every pair at its place, so that a row block's rows follow each other."""
    pair, d = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    place = tl.load(place_ptr + pair)
    if place >= 0:
        row = tl.load(x_ptr + (pair // K).to(tl.int64) * D + d, mask=d < D)
        tl.store(rows_ptr + place.to(tl.int64) * D + d, row, mask=d < D)
