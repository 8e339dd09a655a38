"""The kernels in plain torch: any device, any dtype. What the fast paths are checked against, and their fallback.

Legend: T token rows, P (token, expert) pairs, K choices a token, E experts, D hidden, F ffn, N outputs, H query heads,
G key/value heads, d head size, R rotary positions, C cache blocks of Z rows, S sequences, B blocks a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """One expert: `w2 @ (silu(w1 @ x) * (w3 @ x))` for every row; `w13` is w1 over w3. Returns [T, D]."""
    gate_TF, up_TF = F.linear(x_TD, w13_2FD).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TF) * up_TF, w2_DF)


def grouped_swiglu(
    x_TD: Tensor, token_P: Tensor, expert_P: Tensor, experts: Mapping[int, tuple[Tensor, Tensor]]
) -> Tensor:
    """`y[p] = expert(expert_P[p])(x[token_P[p]])`, unweighted; `experts[e]` is `(w13_2FD, w2_DF)`.

    The pairs ascend by expert. Returns [P, D].
    """
    y_PD = x_TD.new_empty(len(token_P), x_TD.shape[1])
    ids, counts = torch.unique_consecutive(expert_P, return_counts=True)
    start = 0
    for expert, count in zip(ids.tolist(), counts.tolist(), strict=True):
        rows = slice(start, start + count)
        y_PD[rows] = swiglu(x_TD[token_P[rows]], *experts[expert])
        start += count
    return y_PD


def combine(y_PD: Tensor, token_P: Tensor, weight_P: Tensor, n_tokens: int) -> Tensor:
    """Weighted sum of each token's rows, float32, in the order of the pairs (ascending by expert). Returns [T, D]."""
    out_TD = torch.zeros(n_tokens, y_PD.shape[1], dtype=torch.float32, device=y_PD.device)
    if len(token_P) == 0:
        return out_TD
    n_choices = int(torch.bincount(token_P.long(), minlength=n_tokens).max())
    # The i-th pair of every token in turn: index_add_ on a whole batch leaves the order open on CUDA.
    order_P = torch.argsort(token_P, stable=True)
    sorted_P = token_P[order_P].long()
    first_T = torch.searchsorted(sorted_P, torch.arange(n_tokens, device=sorted_P.device))
    rank_P = torch.arange(len(sorted_P), device=sorted_P.device) - first_T[sorted_P]
    for rank in range(n_choices):
        pairs = order_P[rank_P == rank]
        out_TD[token_P[pairs].long()] += weight_P[pairs].float()[:, None] * y_PD[pairs].float()
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, the mean square in float32. Returns [T, D] in the dtype of x."""
    x_f32 = x_TD.float()
    scaled = x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return weight_D * scaled.to(x_TD.dtype)


def gate_top_k(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, best first, and the softmax over their logits.

    Of equal logits the lower expert comes first. Returns ids int64 [T, k] and weights float32 [T, k].
    """
    best_TE, order_TE = torch.sort(logits_TE.float(), dim=-1, descending=True, stable=True)
    return order_TE[:, :k].contiguous(), torch.softmax(best_TE[:, :k], dim=-1)


def rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary embedding, halves convention: `x * cos + (-x2, x1) * sin`."""
    x1, x2 = x_THd.chunk(2, dim=-1)
    return x_THd * cos_Td[:, None] + torch.cat((-x2, x1), dim=-1) * sin_Td[:, None]


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

    Row t goes to cache row `slot_T[t]` = block * block size + offset. `cos`/`sin` are float32 tables by position.
    """
    n_kv, head = k_cache_CZGd.shape[-2:]
    heads_THd = qkv_TX.view(len(qkv_TX), -1, head)
    n_heads = heads_THd.shape[1] - 2 * n_kv
    cos_Td, sin_Td = cos_Rd[position_T], sin_Rd[position_T]
    rotated_THd = rotate(heads_THd[:, : n_heads + n_kv].float(), cos_Td, sin_Td).to(qkv_TX.dtype)
    k_cache_CZGd.view(-1, n_kv, head)[slot_T] = rotated_THd[:, n_heads:].to(k_cache_CZGd.dtype)
    v_cache_CZGd.view(-1, n_kv, head)[slot_T] = heads_THd[:, n_heads + n_kv :].to(v_cache_CZGd.dtype)
    return rotated_THd[:, :n_heads]


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
    step are already written.
    """
    out_THd = torch.empty_like(q_THd)
    size, n_kv, head = k_cache_CZGd.shape[1:]
    group = q_THd.shape[1] // n_kv
    for row, (sequence, position) in enumerate(zip(sequence_T.tolist(), position_T.tolist(), strict=True)):
        first = 0 if window is None else max(0, position + 1 - window)
        blocks = block_table_SB[sequence, : position // size + 1].long()
        keys = k_cache_CZGd[blocks].view(-1, n_kv, head)[first : position + 1].repeat_interleave(group, dim=1)
        values = v_cache_CZGd[blocks].view(-1, n_kv, head)[first : position + 1].repeat_interleave(group, dim=1)
        scores_HJ = torch.einsum("hd,jhd->hj", q_THd[row].float(), keys.float()) * scale
        out_THd[row] = torch.einsum("hj,jhd->hd", scores_HJ.softmax(-1), values.float()).to(q_THd.dtype)
    return out_THd
