"""Kernels that a row has to itself: norms with what surrounds them, the gate's choice, rotary embedding, the draw.

Legend: T token rows, K choices a token, E experts, D hidden, P pairs in expert order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.gate_spec import GateSpec
from workers.kernels.cuda.compiled import gate as gating
from workers.kernels.cuda.compiled import norm as norms
from workers.kernels.cuda.compiled import rotary
from workers.kernels.cuda.launch import options, power
from workers.kernels.ops import Delta, Unsummed

MOST_FUSED = 65536  # experts times hidden size up to which the norm's program multiplies the row with the gate too


@dataclass(frozen=True, slots=True)
class Asked:
    """A row's norm, and what its experts are asked."""

    x_TD: Tensor
    ids_TK: Tensor | None = None  # int64
    weights_TK: Tensor | None = None  # float32


def add_norm(
    residual_TD: Tensor,
    delta: Delta | None,
    weight_D: Tensor,
    eps: float,
    scale: float = 1.0,
    gate_ED: Tensor | None = None,
    spec: GateSpec | None = None,
    bias_E: Tensor | None = None,
    live: Tensor | None = None,
) -> Asked:
    """`residual += scale * delta` in place, its RMSNorm, the gate's choice where one is given.

    live: int32 [1], how many rows are real; the others choose nobody (id -1).
    """
    t, d = residual_TD.shape
    device = residual_TD.device
    x_TD = torch.empty_like(residual_TD)
    ids_TK = weights_TK = None
    if gate_ED is not None and spec is not None:
        ids_TK = torch.empty(t, spec.top_k, dtype=torch.int64, device=device)
        weights_TK = torch.empty(t, spec.top_k, dtype=torch.float32, device=device)
    if isinstance(delta, Unsummed):
        what: tuple[Any, ...] = (delta.rows_PD, delta.place_TK, delta.weights_TK)
        kind, k = 2, delta.weights_TK.shape[1]
    else:
        what, kind, k = (delta, None, None), int(delta is not None), 1
    rule = spec or GateSpec(1)
    n_experts = 1 if gate_ED is None else len(gate_ED)
    if t:
        norms.add_norm_kernel[(t,)](
            residual_TD, *what, weight_D, x_TD, gate_ED, bias_E, live, ids_TK, weights_TK, eps,
            scale, rule.scale, D=d, D2=power(d), E=n_experts, E2=power(n_experts), K=k, K2=power(k), C=rule.top_k,
            C2=power(rule.top_k), DELTA=kind, GATE=gate_ED is not None, SIGMOID=rule.score == "sigmoid",
            NORMALIZE=rule.normalize, BIAS=bias_E is not None, LIVE=live is not None,
            num_warps=16 if gate_ED is not None else 8, **options(device),
        )  # fmt: skip
    return Asked(x_TD, ids_TK, weights_TK)


def weighted_sum(unsummed: Unsummed, dtype: torch.dtype) -> Tensor:
    """The weighted sum of each token's rows in expert order, in float32, as `dtype`. Returns a new [T, D]."""
    (t, k), d = unsummed.weights_TK.shape, unsummed.rows_PD.shape[1]
    y_TD = torch.empty(t, d, dtype=dtype, device=unsummed.rows_PD.device)
    if t:
        norms.weighted_sum_kernel[(t,)](
            unsummed.rows_PD, unsummed.place_TK, unsummed.weights_TK, y_TD, D=d, D2=power(d), K=k, K2=power(k),
            num_warps=8,
        )  # fmt: skip
    return y_TD


def choose(
    logits_TE: Tensor, spec: GateSpec, bias_E: Tensor | None = None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gate's choice from its logits: ids int64 [T, K], best first, and weights float32 [T, K]."""
    t, e = logits_TE.shape
    ids_TK = torch.empty(t, spec.top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(t, spec.top_k, dtype=torch.float32, device=logits_TE.device)
    if t:
        gating.gate_kernel[(t,)](
            logits_TE, bias_E, live, ids_TK, weights_TK, spec.scale, E=e, E2=power(e), K=spec.top_k,
            K2=power(spec.top_k), SIGMOID=spec.score == "sigmoid", NORMALIZE=spec.normalize, BIAS=bias_E is not None,
            LIVE=live is not None, num_warps=1 if e <= 64 else 4, **options(logits_TE.device),
        )  # fmt: skip
    return ids_TK, weights_TK


def rotary_write(
    qkv_TX: Tensor, slot_T: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_CZGd: Tensor, v_CZGd: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Norms where there are weights for them ([d]: each head's; longer: the whole row's), rotation, the write of k and
    v to `slot_T` (-1: nowhere). Returns q [T, H, d]."""
    g, d = k_CZGd.shape[2:]
    t, h = len(qkv_TX), qkv_TX.shape[1] // d - 2 * g
    q_THd = torch.empty(t, h, d, dtype=qkv_TX.dtype, device=qkv_TX.device)
    heads2, d2 = power(h + 2 * g), power(d)
    if t:
        rotary.rotary_write_kernel[(t,)](
            qkv_TX, q_THd, k_CZGd, v_CZGd, slot_T, cos_TR, sin_TR, q_norm, k_norm, eps, H=h, G=g, d=d,
            R=cos_TR.shape[1], D2=d2, HEADS2=heads2, NORM=0 if q_norm is None else 1 if len(q_norm) == d else 2,
            num_warps=4 if heads2 * d2 <= 4096 else 8, **options(qkv_TX.device),
        )  # fmt: skip
    return q_THd
