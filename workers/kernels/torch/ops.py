"""The operations in plain torch: any device, any dtype. What other devices' are checked against, and their fallback.

Legend: that of `workers.kernels.ops`; and L keys, h query heads for each key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.gate_spec import GateSpec
from workers.kernels.dispatch import Ints, Plan
from workers.kernels.experts import LayerExperts
from workers.kernels.message import HEADER_BYTES
from workers.kernels.ops import Answers, AttentionMetadata, Delta, Graph, Ops, QKNorm, Result, summed
from workers.weights import Matrix, WeightFormat


class TorchOps:
    """`Ops` of a device that has no kernels of its own."""

    capture_rows = 0
    exact_rows = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    def matrix(self, weight_ND: Tensor, bias_N: Tensor | None = None) -> Matrix:
        bias_N = None if bias_N is None else bias_N.to(self.device, self.dtype)
        return Matrix(weight_ND.detach().to(self.device, self.dtype).contiguous(), None, bias_N)

    def linear(self, x_TD: Tensor, weight: Matrix) -> Tensor:
        if weight.scale_N is None:
            return F.linear(x_TD, weight.values_ND.to(x_TD.dtype), weight.bias_N)
        y_TN = F.linear(x_TD, weight.values_ND.to(x_TD.dtype)) * weight.scale_N
        return (y_TN if weight.bias_N is None else y_TN + weight.bias_N).to(x_TD.dtype)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_f32 = x_TD.float()
        scaled = x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
        return weight_D * scaled.to(x_TD.dtype)

    def add_rms_norm(
        self, residual_TD: Tensor, delta: Delta, weight_D: Tensor, eps: float, scale: float = 1.0
    ) -> Tensor:
        self.add(residual_TD, delta, scale)
        return self.rms_norm(residual_TD, weight_D, eps)

    def add_norm_gate(
        self, residual_TD: Tensor, delta: Delta, weight_D: Tensor, eps: float, gate: Matrix, spec: GateSpec,
        bias_E: Tensor | None = None, scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x_TD = self.add_rms_norm(residual_TD, delta, weight_D, eps, scale)
        return x_TD, *self.gate(self.linear(x_TD, gate), spec, bias_E)

    def add(self, residual_TD: Tensor, delta: Delta, scale: float = 1.0) -> None:
        residual_TD.add_(summed(delta), alpha=scale)

    def rotary_write(
        self, qkv_TX: Tensor, metadata: AttentionMetadata, cos_Tr: Tensor, sin_Tr: Tensor, k_cache_CZGd: Tensor,
        v_cache_CZGd: Tensor, norm: QKNorm | None = None,
    ) -> Tensor:  # fmt: skip
        n_kv, head = k_cache_CZGd.shape[-2:]
        k_size = n_kv * head
        q_TX, k_TX, v_TX = torch.split(qkv_TX, [qkv_TX.shape[1] - 2 * k_size, k_size, k_size], dim=1)
        if norm is not None:
            q_TX, k_TX = (
                self.rms_norm(x_TX.reshape(len(x_TX), -1, len(weight)), weight, norm.eps).flatten(1)
                for x_TX, weight in ((q_TX, norm.q_weight), (k_TX, norm.k_weight))
            )
        q_THd, k_TGd = (_rotate(x.reshape(len(x), -1, head), cos_Tr, sin_Tr) for x in (q_TX, k_TX))
        k_cache_CZGd.view(-1, n_kv, head)[metadata.slot_T] = k_TGd.to(k_cache_CZGd.dtype)
        v_cache_CZGd.view(-1, n_kv, head)[metadata.slot_T] = v_TX.reshape(-1, n_kv, head).to(v_cache_CZGd.dtype)
        return q_THd

    def attention(
        self, q_THd: Tensor, k_cache_CZGd: Tensor, v_cache_CZGd: Tensor, metadata: AttentionMetadata, scale: float,
        window: int | None = None,
    ) -> Tensor:  # fmt: skip
        out_THd = torch.empty_like(q_THd)
        size = k_cache_CZGd.shape[1]
        last_S = metadata.position_T[torch.tensor(metadata.q_start[1:], device=q_THd.device) - 1].tolist()
        for (begin, end), sequence, last in zip(pairwise(metadata.q_start), range(len(last_S)), last_S, strict=True):
            first_row = last + 1 - (end - begin)
            first = 0 if window is None else max(0, first_row + 1 - window)
            blocks = metadata.block_table_SB[sequence, first // size : last // size + 1].long()
            keys = slice(first % size, last + 1 - first // size * size)
            k_GLd, v_GLd = (
                pool.index_select(0, blocks).flatten(0, 1)[keys].transpose(0, 1).to(q_THd.dtype)
                for pool in (k_cache_CZGd, v_cache_CZGd)
            )
            row_N1 = torch.arange(first_row, last + 1, device=q_THd.device)[:, None]
            key_1L = torch.arange(first, last + 1, device=q_THd.device)
            seen_NL = key_1L <= row_N1
            if window is not None:
                seen_NL &= key_1L > row_N1 - window
            q_GhNd = q_THd[begin:end].view(end - begin, len(k_GLd), -1, q_THd.shape[-1]).permute(1, 2, 0, 3)
            y_GhNd = F.scaled_dot_product_attention(
                q_GhNd, k_GLd[:, None].expand(-1, q_GhNd.shape[1], -1, -1),
                v_GLd[:, None].expand(-1, q_GhNd.shape[1], -1, -1), attn_mask=seen_NL, scale=scale,
            )  # fmt: skip
            out_THd[begin:end] = y_GhNd.permute(2, 0, 1, 3).flatten(1, 2)
        return out_THd

    def gate(self, logits_TE: Tensor, spec: GateSpec, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores_TE = logits_TE.float()
        scores_TE = scores_TE.sigmoid() if spec.score == "sigmoid" else scores_TE.softmax(-1)
        ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
        ids_TK = torch.sort(ranked_TE, dim=-1, descending=True, stable=True).indices[:, : spec.top_k].contiguous()
        weights_TK = scores_TE.gather(1, ids_TK)
        if spec.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return ids_TK, weights_TK * spec.scale

    def swiglu(self, x_TD: Tensor, w13: Matrix, w2: Matrix, gate: Matrix | None = None) -> Tensor:
        gate_TF, up_TF = self.linear(x_TD, w13).chunk(2, dim=-1)
        y_TD = self.linear(F.silu(gate_TF) * up_TF, w2)
        return y_TD if gate is None else y_TD * self.linear(x_TD, gate).sigmoid()

    def layer_experts(
        self, n_layers: int, n_experts: int, hidden_size: int, ffn_size: int, weight_format: WeightFormat
    ) -> list[LayerExperts]:
        return [LayerExperts(n_experts, hidden_size, ffn_size, weight_format) for _ in range(n_layers)]

    def rows_LE(self, layers: Sequence[LayerExperts]) -> Tensor:
        return torch.stack([layer.rows_E for layer in layers])

    def experts(
        self,
        layer: LayerExperts,
        x_TD: Tensor,
        token_P: Tensor,
        expert_P: Tensor,
        out_PD: Tensor | None = None,
    ) -> Tensor:
        if missing := layer.missing(expert_P):
            raise KeyError(*missing)
        y_PD = x_TD.new_empty(len(token_P), x_TD.shape[1]) if out_PD is None else out_PD
        ids, counts = torch.unique_consecutive(expert_P, return_counts=True)
        start = 0
        for expert, count in zip(ids.tolist(), counts.tolist(), strict=True):
            rows = slice(start, start + count)
            y_PD[rows] = self.swiglu(x_TD[token_P[rows].to(x_TD.device)], *layer.weights[expert])
            layer.rows_E[expert] += count
            start += count
        return y_PD

    def experts_combined(self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Delta:
        if len(x_TD) == 0:
            return torch.empty_like(x_TD)
        owner_E, counter_E = np.zeros((2, layer.n_experts), np.int64)
        plan = self.dispatch_plan(ids_TK.cpu(), weights_TK.cpu(), owner_E, 1, counter_E)
        token_P, expert_P = (torch.from_numpy(array) for array in plan.pairs)
        return self.weighted_sum((self.experts(layer, x_TD, token_P, expert_P),), plan)

    def dispatch_plan(self, ids_TK: Tensor, weights_TK: Tensor, owner_E: Ints, n_workers: int, counter_E: Ints) -> Plan:
        ids, weights = ids_TK.numpy(), weights_TK.numpy()
        made = Plan(ids.shape[0], ids.shape[1], len(owner_E), n_workers)
        n_experts, ids_P = len(owner_E), ids.ravel()
        counter_E += np.bincount(ids_P, minlength=n_experts)
        order_P = np.argsort(owner_E[ids_P] * n_experts + ids_P, kind="stable")
        place_P = np.empty_like(order_P)
        place_P[order_P] = np.arange(len(order_P))
        rank_TK = ids.argsort(axis=1)
        made.place_TK[:] = np.take_along_axis(place_P.reshape(ids.shape), rank_TK, 1)
        made.weights_TK[:] = np.take_along_axis(weights, rank_TK, 1)
        token_P, (local_P, expert_P) = order_P // made.n_choices, made.pairs
        expert_P[:] = ids_P[order_P]
        cuts = [0, *np.bincount(owner_E[ids_P], minlength=n_workers).cumsum()]
        row_cuts = [0]
        for begin, end in pairwise(cuts):
            row_R, local_P[begin:end] = np.unique(token_P[begin:end], return_inverse=True)
            row_cuts.append(row_cuts[-1] + len(row_R))
            made.row_P[row_cuts[-2] : row_cuts[-1]] = row_R
        made.memory[: 2 * (n_workers + 1)] = cuts + row_cuts
        return made

    def pack_request(self, plan: Plan, x_TD: Tensor, rows: slice, pairs: slice, message: memoryview) -> None:
        row_R = torch.from_numpy(plan.row_P[rows]).to(x_TD.device)
        sent_RD = torch.frombuffer(message, dtype=x_TD.dtype, count=len(row_R) * x_TD.shape[1], offset=HEADER_BYTES)
        sent_RD.view(len(row_R), -1).copy_(x_TD.index_select(0, row_R))
        both_2P = torch.frombuffer(message, dtype=torch.int32, offset=HEADER_BYTES + sent_RD.nbytes).view(2, -1)
        for sent_P, array in zip(both_2P, plan.pairs, strict=True):
            sent_P.copy_(torch.from_numpy(array[pairs]))

    def weighted_sum(self, parts: Sequence[Tensor], plan: Plan) -> Tensor:
        rows_PD = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
        place_TK, weights_TK = (
            torch.from_numpy(array).to(rows_PD.device) for array in (plan.place_TK, plan.weights_TK)
        )
        total_TD = rows_PD.index_select(0, place_TK[:, 0]).float().mul_(weights_TK[:, :1])
        for k in range(1, plan.n_choices):
            total_TD += rows_PD.index_select(0, place_TK[:, k]).float().mul_(weights_TK[:, k : k + 1])
        return total_TD.to(rows_PD.dtype)

    def answers(self, layers: Sequence[LayerExperts]) -> Answers | None:
        """None: requests are parsed."""
        return None

    def capture(self, function: Callable[[Ops], Result]) -> tuple[Graph, Result]:
        raise NotImplementedError("plain torch captures nothing: capture_rows is 0")


def _rotate(x_THd: Tensor, cos_Tr: Tensor, sin_Tr: Tensor) -> Tensor:
    """The first r entries of every head rotated, by halves, in float32."""
    turned_THr, rest_THd = x_THd.float().tensor_split((cos_Tr.shape[1],), dim=-1)
    x1, x2 = turned_THr.chunk(2, dim=-1)
    turned_THr = turned_THr * cos_Tr[:, None] + torch.cat((-x2, x1), dim=-1) * sin_Tr[:, None]
    return torch.cat((turned_THr, rest_THd), dim=-1).to(x_THd.dtype)
