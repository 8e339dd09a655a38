"""The gate's choice: the K best experts of a row and their weights.

Legend: T token rows, E experts, K choices.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(
    logits,  # float32 [E2]
    bias_ptr,  # float32 [E], with BIAS: added to the score for the choice alone
    is_row,  # whether the row is one; else it chooses nobody
    ids_ptr,  # out [K]: best first
    weights_ptr,  # out float32 [K]
    E: tl.constexpr,
    E2: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    scale,
):
    """Of equal scores the lower expert comes first."""
    expert = tl.arange(0, E2)
    logits = tl.where(expert < E, logits, float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        score = tl.exp(logits - tl.max(logits, 0))
        if not NORMALIZE or BIAS:
            score = score / tl.sum(score, 0)
    if BIAS:
        key = tl.where(expert < E, score + tl.load(bias_ptr + expert, mask=expert < E, other=0.0), float("-inf"))
    elif SIGMOID:
        key = tl.where(expert < E, score, float("-inf"))
    else:
        key = logits
    choice = tl.arange(0, K2)
    ids, weights = tl.full([K2], -1, tl.int32), tl.zeros([K2], tl.float32)
    total = 0.0
    for i in tl.static_range(K):
        best = tl.max(key, 0)
        found = tl.min(tl.where(key == best, expert, E2), 0)
        weight = tl.sum(tl.where(expert == found, score, 0.0), 0)
        ids = tl.where(choice == i, found, ids)
        weights = tl.where(choice == i, weight, weights)
        key = tl.where(expert == found, float("-inf"), key)
        total += weight
    if NORMALIZE:
        weights = weights / (total + 1e-20 if SIGMOID else total)
    tl.store(ids_ptr + choice, tl.where(is_row, ids, -1).to(ids_ptr.dtype.element_ty), mask=choice < K)
    tl.store(weights_ptr + choice, weights * scale, mask=choice < K)


@triton.jit
def gate_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,
    live_ptr,  # int32 [1], with LIVE: rows from there on are padding
    ids_ptr,  # out [T, K]
    weights_ptr,  # out float32 [T, K]
    scale,
    E: tl.constexpr,
    E2: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    LIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    t, expert = tl.program_id(0), tl.arange(0, E2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    logits = tl.load(logits_ptr + t * E + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    is_row = True
    if LIVE:
        is_row = t < tl.load(live_ptr)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at_ids, at_weights = ids_ptr + t * K, weights_ptr + t * K
    choose(logits, bias_ptr, is_row, at_ids, at_weights, E, E2, K, K2, SIGMOID, NORMALIZE, BIAS, scale)
