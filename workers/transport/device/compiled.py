"""Triton kernels of an exchange through device memory: rows out and back, and whose turn it is.

A flag is an int64 that only rises: the number of the step, times a constant, plus the layer. So nothing is ever reset,
and a signal of a step that was thrown away says nothing in a later one.

Legend: T token rows, K choices a token, P = T * K pairs, D hidden size, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit(do_not_specialize=["layer"])
def signal_kernel(flag_ptr, step_ptr, status_ptr, layer):
    """The flag says `layer` of the step, after everything that was launched before has been written. Of a step that is
    void nothing more is said, so that nobody takes what the memory holds for rows."""
    step = tl.load(step_ptr)
    if (step >= 0) & (tl.load(status_ptr) == 0):
        tl.atomic_xchg(flag_ptr, step + layer, sem="release", scope="sys")


@triton.jit(do_not_specialize=["layer", "limit_ns"])
def wait_kernel(flag_ptr, step_ptr, status_ptr, layer, waited_ptr, limit_ns, STRIDE: tl.constexpr):
    """One program a flag: until it says `layer` of the step. Whoever waited too long says so in the status, and from
    then on nobody waits in this step. waited: int64, the nanoseconds that each program waited are added."""
    step = tl.load(step_ptr)
    if step >= 0:
        flag = flag_ptr + tl.program_id(0) * STRIDE
        waited = waited_ptr + tl.program_id(0)
        before = tl.load(waited)
        began = globaltimer()
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        if tl.load(status_ptr) == 0:
            end = began + limit_ns
            while (seen < step + layer) & (globaltimer() < end):
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        if seen < step + layer:
            tl.atomic_xchg(status_ptr, 1)
        tl.store(waited, before + (globaltimer() - began))


@triton.jit(do_not_specialize=["n_rows"])
def ask_kernel(
    x_ptr,  # [T, D]
    ids_ptr,  # int32 or int64 [T, K]: the experts of each row, -1: none
    owner_ptr,  # int32 [E]: the worker that computes each expert, -1: nobody here
    out_ptr,  # out [T, D]
    word_ptr,  # out int32 [P]: expert and worker, ascending by expert within a row; -1: nobody's
    place_ptr,  # out int32 [P]: where each choice is in `word`, which is where its row will be; -1: nobody's
    count_ptr,  # int64 [E]: the pairs of each expert are added to it
    sent_ptr,  # int64 [workers]: the rows that each worker is to take are added to it
    n_rows,  # of x; programs beyond it say that there is no row
    D: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
):
    """One program a row."""
    t = tl.program_id(0)
    k = tl.arange(0, K2)
    ids = tl.load(ids_ptr + t * K + k, mask=(k < K) & (t < n_rows), other=-1).to(tl.int32)
    owner = tl.load(owner_ptr + ids, mask=ids >= 0, other=-1)
    is_held = owner >= 0
    key = tl.where(k < K, ids, 1 << 30)
    before = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (k[None, :] < k[:, None]))
    at = t * K + tl.sum(before.to(tl.int32), 1)
    tl.store(word_ptr + at, tl.where(is_held, (owner << 16) | ids, -1), mask=k < K)
    tl.atomic_add(count_ptr + ids, 1, mask=is_held)
    again = (owner[None, :] == owner[:, None]) & (k[None, :] < k[:, None])
    tl.atomic_add(sent_ptr + owner, 1, mask=is_held & (tl.sum(again.to(tl.int32), 1) == 0))
    if t < n_rows:
        tl.store(place_ptr + t * K + k, tl.where(is_held, at, -1), mask=k < K)
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
            row = t.to(tl.int64) * D + d
            tl.store(out_ptr + row, tl.load(x_ptr + row, mask=d < D), mask=d < D)


@triton.jit(do_not_specialize=["me"])
def take_kernel(
    x_ptr,  # [T, D], the router's
    word_ptr,  # int32 [P], the router's
    step_ptr,  # int64: below 0, the router takes no part in this step
    status_ptr,  # int64: above 0, the step is void
    pairs_ptr,  # int64: the pairs that are ours are added to it
    out_ptr,  # out [T, D]: the rows that have a choice here
    ids_ptr,  # out int32 [P]: the expert of each pair that is ours, -1: not ours
    me,
    D: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
):
    """One program a row."""
    t = tl.program_id(0)
    k = tl.arange(0, K2)
    is_on = (tl.load(step_ptr) >= 0) & (tl.load(status_ptr) == 0)
    word = tl.load(word_ptr + t * K + k, mask=(k < K) & is_on, other=-1)
    ours = (word >= 0) & ((word >> 16) == me)
    tl.store(ids_ptr + t * K + k, tl.where(ours, word & 0xFFFF, -1), mask=k < K)
    n_ours = tl.sum(ours.to(tl.int32), 0)
    if n_ours > 0:
        tl.atomic_add(pairs_ptr, n_ours.to(tl.int64))
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
            row = t.to(tl.int64) * D + d
            tl.store(out_ptr + row, tl.load(x_ptr + row, mask=d < D), mask=d < D)


@triton.jit
def give_kernel(
    y_ptr,  # [n, D]: rows of pairs
    place_ptr,  # int32 [P]: the row of each pair, -1: there is none
    ids_ptr,  # int32 [P]: the expert of each pair that is ours, -1: not ours
    status_ptr,  # int64: above 0, the step is void
    out_ptr,  # out [P, D], the router's
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """One program a pair. If its expert is not held the step is void: the router would add up whatever lies there."""
    p = tl.program_id(0)
    place = tl.load(place_ptr + p)
    if (place < 0) & (tl.load(ids_ptr + p) >= 0):
        tl.atomic_xchg(status_ptr, 1)
    if place >= 0:
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
            value = tl.load(y_ptr + place.to(tl.int64) * D + d, mask=d < D)
            tl.store(out_ptr + p.to(tl.int64) * D + d, value, mask=d < D)
