"""Rotary embedding with the write into the paged cache, and attention over block tables.

Legend: T token rows, H query heads, G key/value heads, d head size, X = (H + 2G) * d, R rotary positions, C cache
blocks of Z rows, S sequences, B blocks a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels import native, reference
from workers.kernels.linear import is_fast, with_unit_stride


def rotary_write(
    qkv_TX: Tensor,
    position_T: Tensor,
    slot_T: Tensor,
    cos_Rd: Tensor,
    sin_Rd: Tensor,
    k_cache_CZGd: Tensor,
    v_cache_CZGd: Tensor,
) -> Tensor:
    """Rotate q and k of `qkv` ([T, X = (H + 2G) * d]), write k and v to the cache, return q [T, H, d].

    Row t goes to cache row `slot_T[t]` = block * block size + offset. `position_T` and `slot_T` are int64;
    `cos`/`sin` are float32 tables by position, `d` wide (the second half repeats the first).
    """
    if not is_fast(qkv_TX) or not is_fast(k_cache_CZGd):
        return reference.rotary_write(qkv_TX, position_T, slot_T, cos_Rd, sin_Rd, k_cache_CZGd, v_cache_CZGd)
    qkv_TX = with_unit_stride(qkv_TX)
    position_T, slot_T = position_T.contiguous(), slot_T.contiguous()
    n_rows = len(qkv_TX)
    n_kv, head = k_cache_CZGd.shape[-2:]
    n_heads = qkv_TX.shape[1] // head - 2 * n_kv
    q_THd = native.empty(n_rows, n_heads, head)
    team = native.team(4 * qkv_TX.numel())
    native.rotary_write(
        team,
        *(qkv_TX.data_ptr(), 4 * qkv_TX.stride(0), q_THd.data_ptr(), n_rows, n_heads, n_kv, head),
        *(position_T.data_ptr(), slot_T.data_ptr(), cos_Rd.data_ptr(), sin_Rd.data_ptr()),
        *(k_cache_CZGd.data_ptr(), v_cache_CZGd.data_ptr()),
    )
    return q_THd


def paged_attention(
    q_THd: Tensor,
    k_cache_CZGd: Tensor,
    v_cache_CZGd: Tensor,
    block_table_SB: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention over paged keys and values. Returns [T, H, d].

    Query t belongs to sequence `sequence_T[t]` and sees its keys 0 ... `position_T[t]`, of which the last `window`
    when there is one. Key j of sequence s lies in block `block_table[s, j // Z]` at offset `j % Z`. The keys of this
    step are already written. `block_table` is int32, `sequence_T` and `position_T` are int64.
    """
    if not is_fast(q_THd) or not is_fast(k_cache_CZGd):
        return reference.paged_attention(
            q_THd, k_cache_CZGd, v_cache_CZGd, block_table_SB, sequence_T, position_T, scale, window
        )
    q_THd, block_table_SB = q_THd.contiguous(), block_table_SB.to(torch.int32).contiguous()
    sequence_T, position_T = sequence_T.contiguous(), position_T.contiguous()
    n_rows, n_heads, head = q_THd.shape
    size, n_kv = k_cache_CZGd.shape[1:3]
    group, most_keys = n_heads // n_kv, block_table_SB.shape[1] * size
    out_THd = native.empty(n_rows, n_heads, head)
    team = native.team(4 * n_rows * most_keys * n_kv * head)
    scratch = native.empty(team, 2 * group + group * most_keys)  # addresses of the queries, then their scores
    native.paged_attention(
        team,
        *(q_THd.data_ptr(), out_THd.data_ptr(), n_rows, n_heads, n_kv, head),
        *(k_cache_CZGd.data_ptr(), v_cache_CZGd.data_ptr(), size, block_table_SB.data_ptr()),
        *(4 * block_table_SB.stride(0), sequence_T.data_ptr(), position_T.data_ptr(), native.float_bits(scale)),
        *(window or most_keys, scratch.data_ptr(), 4 * scratch.stride(0), 4 * most_keys),
    )
    return out_THd
