"""Causal attention of one micro-batch over the paged KV cache.

Shape legend: T rows of the micro-batch, N rows of one sequence, L keys they see, S sequences that decode, B blocks,
H query heads, G key/value heads, h query heads per key/value head, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.attention import paged_attention
from workers.model.batch import Batch
from workers.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Decode:
    """All sequences that have one row."""

    row_S: Tensor  # int64, where their rows are
    block_table_SB: Tensor
    sequence_S: Tensor  # int64, 0 ... S - 1
    position_S: Tensor  # int64


@dataclass(frozen=True, slots=True)
class Prefill:
    """The rows of one sequence that has several."""

    rows: slice
    blocks_B: Tensor  # the blocks that hold what any of the rows sees
    keys: slice  # of the tokens in those blocks
    mask_NL: Tensor | None  # added to the scores; None: plain causal, from position 0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Who attends to what: the same in all layers, so made once a step."""

    decode: Decode | None
    prefills: tuple[Prefill, ...]


def make_plan(batch: Batch, cache: KVCache, window: int | None) -> AttentionPlan:
    """`window`: a row sees itself and the `window - 1` tokens before it; None: all before it."""
    n_sequences = len(batch.q_start) - 1
    if batch.n_rows == n_sequences:  # the common step: row s is all of sequence s
        row_S = torch.arange(n_sequences, device=cache.device)
        return AttentionPlan(
            Decode(row_S, batch.block_table_SB.to(cache.device), row_S, batch.positions_T.to(cache.device)), ()
        )
    starts = torch.tensor(batch.q_start)
    single_S = (starts.diff() == 1).nonzero()[:, 0]
    row_S = starts.index_select(0, single_S)
    decode = Decode(
        row_S.to(cache.device),
        batch.block_table_SB.index_select(0, single_S).to(cache.device),
        torch.arange(len(single_S), device=cache.device),
        batch.positions_T.index_select(0, row_S).to(cache.device),
    )
    return AttentionPlan(decode if len(single_S) else None, tuple(_prefills(batch, cache, window)))


def _prefills(batch: Batch, cache: KVCache, window: int | None) -> Iterator[Prefill]:
    for sequence, context in enumerate(batch.context_S.tolist()):
        rows = slice(batch.q_start[sequence], batch.q_start[sequence + 1])
        first_row = context - (rows.stop - rows.start)
        if rows.stop - rows.start == 1:
            continue
        first_key = 0 if window is None else max(0, first_row - window + 1)
        begin, end = first_key // cache.block_size, -(-context // cache.block_size)
        plain = first_row == 0 and (window is None or context <= window)
        yield Prefill(
            rows=rows,
            blocks_B=batch.block_table_SB[sequence, begin:end].to(cache.device),
            keys=slice(first_key - begin * cache.block_size, context - begin * cache.block_size),
            mask_NL=None if plain else _mask(first_row, first_key, context, window, cache),
        )


def _mask(first_row: int, first_key: int, context: int, window: int | None, cache: KVCache) -> Tensor:
    """-inf where row (from `first_row`) must not see key (from `first_key`); both end at `context`."""
    row_N1 = torch.arange(first_row, context, device=cache.device)[:, None]
    key_1L = torch.arange(first_key, context, device=cache.device)
    hidden_NL = key_1L > row_N1
    if window is not None:
        hidden_NL |= key_1L <= row_N1 - window
    mask_NL = torch.zeros(hidden_NL.shape, dtype=cache.dtype, device=cache.device)
    return mask_NL.masked_fill_(hidden_NL, float("-inf"))


def attend(plan: AttentionPlan, cache: KVCache, layer: int, q_THd: Tensor, window: int | None) -> Tensor:
    """The attention of every row, [T, H, d]. The K and V of the rows are in the cache already."""
    decode = plan.decode
    if decode is not None and not plan.prefills:  # its rows are all there are, in order
        return _attend_decode(decode, cache, layer, q_THd, window)
    out_THd = torch.empty_like(q_THd)
    if decode is not None:
        q_SHd = q_THd.index_select(0, decode.row_S)
        out_THd.index_copy_(0, decode.row_S, _attend_decode(decode, cache, layer, q_SHd, window))
    for part in plan.prefills:
        out_THd[part.rows] = _attend_prefill(part, cache, layer, q_THd[part.rows])
    return out_THd


def _attend_decode(decode: Decode, cache: KVCache, layer: int, q_SHd: Tensor, window: int | None) -> Tensor:
    return paged_attention(
        q_SHd, cache.k[layer], cache.v[layer], decode.block_table_SB, decode.sequence_S, decode.position_S,
        q_SHd.shape[-1] ** -0.5, window,
    )  # fmt: skip


def _attend_prefill(part: Prefill, cache: KVCache, layer: int, q_NHd: Tensor) -> Tensor:
    """The query heads that share a key/value head form a batch of their own, so K and V need not be repeated."""
    k_LGd, v_LGd = (gathered[part.keys] for gathered in cache.read(layer, part.blocks_B))
    n_heads, n_kv_heads = q_NHd.shape[1], k_LGd.shape[1]
    q_GhNd = q_NHd.view(len(q_NHd), n_kv_heads, -1, q_NHd.shape[-1]).permute(1, 2, 0, 3)
    k_GhLd, v_GhLd = (x.transpose(0, 1)[:, None].expand(-1, n_heads // n_kv_heads, -1, -1) for x in (k_LGd, v_LGd))
    out_GhNd = F.scaled_dot_product_attention(
        q_GhNd, k_GhLd, v_GhLd, attn_mask=part.mask_NL, is_causal=part.mask_NL is None
    )
    return out_GhNd.permute(2, 0, 1, 3).flatten(1, 2)
