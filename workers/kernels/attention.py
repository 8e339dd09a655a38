"""Rotary embedding with the write into the paged cache, and attention over block tables.

Legend: T token rows, H query heads, G key/value heads, d head size, X = (H + 2G) * d, R rotary positions, C cache
blocks of Z rows, S sequences, B blocks a sequence.
"""

from __future__ import annotations

from torch import Tensor

from workers.kernels import reference


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
    return reference.rotary_write(qkv_TX, position_T, slot_T, cos_Rd, sin_Rd, k_cache_CZGd, v_cache_CZGd)


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
    return reference.paged_attention(
        q_THd, k_cache_CZGd, v_cache_CZGd, block_table_SB, sequence_T, position_T, scale, window
    )
