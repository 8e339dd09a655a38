"""`Ops` of an NVIDIA GPU: launches of the Triton kernels, and steps captured as CUDA graphs.

Legend: that of `workers.kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.device import to_device
from workers.gate_spec import GateSpec
from workers.kernels.cuda import attention, rows
from workers.kernels.cuda.experts import compute, quantized_rows
from workers.kernels.cuda.graphs import capture
from workers.kernels.cuda.layer_experts import CudaLayerExperts
from workers.kernels.cuda.linear import linear
from workers.kernels.cuda.slot_pool import SlotPool
from workers.kernels.dispatch import Plan
from workers.kernels.experts import LayerExperts
from workers.kernels.ops import AttentionMetadata, Delta, Graph, Ops, QKNorm, Result, Unsummed
from workers.kernels.torch.ops import TorchOps
from workers.weights import Matrix, WeightFormat


class CudaOps(TorchOps):
    """For rows of 16 bits. Everything only launches, but for `experts`, whose experts are checked on the host."""

    exact_rows = True

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        live: Tensor | None = None,
        most_items: int = 0,
        pool: Any = None,
    ) -> None:
        """live: int [1] on the device, how many rows are real, for steps with rows that are padding. most_items: how
        many splits (`attention`) the rows that decode have at most, where less is known than their tables' width.
        pool: the memory of graphs, which all that are captured by operations of one origin share."""
        super().__init__(device, dtype)
        self._live = live
        self._most_items = most_items
        self._step: _AttentionStep | None = None
        self._pool = pool

    def padded(self, live: Tensor, most_items: int) -> CudaOps:
        """The operations of a step in which only the first `live` rows are real."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaOps(self.device, self.dtype, live, most_items, self._pool)

    def linear(self, x_TD: Tensor, weight: Matrix) -> Tensor:
        return linear(x_TD.contiguous(), weight.values_ND, weight.bias_N)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rows.add_norm(x_TD.contiguous(), None, weight_D, eps).x_TD

    def add_rms_norm(
        self, residual_TD: Tensor, delta: Delta, weight_D: Tensor, eps: float, scale: float = 1.0
    ) -> Tensor:
        return rows.add_norm(residual_TD, delta, weight_D, eps, scale).x_TD

    def add(self, residual_TD: Tensor, delta: Delta, scale: float = 1.0) -> None:
        super().add(residual_TD, self._summed(delta), scale)

    def _summed(self, delta: Delta) -> Tensor:
        return rows.weighted_sum(delta, self.dtype) if isinstance(delta, Unsummed) else delta

    def add_norm_gate(
        self,
        residual_TD: Tensor,
        delta: Delta,
        weight_D: Tensor,
        eps: float,
        gate: Matrix,
        spec: GateSpec,
        bias_E: Tensor | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if gate.values_ND.numel() > rows.MOST_FUSED or gate.bias_N is not None:
            x_TD = self.add_rms_norm(residual_TD, delta, weight_D, eps, scale)
            logits_TE = linear(x_TD, gate.values_ND, gate.bias_N, torch.float32)
            return x_TD, *rows.choose(logits_TE, spec, bias_E, self._live)
        asked = rows.add_norm(residual_TD, delta, weight_D, eps, scale, gate.values_ND, spec, bias_E, self._live)
        assert asked.ids_TK is not None and asked.weights_TK is not None
        return asked.x_TD, asked.ids_TK, asked.weights_TK

    def rotary_write(
        self,
        qkv_TX: Tensor,
        metadata: AttentionMetadata,
        cos_Tr: Tensor,
        sin_Tr: Tensor,
        k_cache_CZGd: Tensor,
        v_cache_CZGd: Tensor,
        norm: QKNorm | None = None,
    ) -> Tensor:
        weights = (None, None, 0.0) if norm is None else norm
        return rows.rotary_write(qkv_TX, metadata.slot_T, cos_Tr, sin_Tr, k_cache_CZGd, v_cache_CZGd, *weights)

    def attention(
        self,
        q_THd: Tensor,
        k_cache_CZGd: Tensor,
        v_cache_CZGd: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        (_, h, d), (_, z, g, _) = q_THd.shape, k_cache_CZGd.shape
        if self._step is None or self._step.metadata is not metadata:
            self._step = _AttentionStep(metadata, attention.tile_rows(h, g, d), z, self._most_items)
        items = self._step.items(h, d, window)
        return attention.attend(q_THd, k_cache_CZGd, v_cache_CZGd, self._step.who, items, scale, window)

    def gate(self, logits_TE: Tensor, spec: GateSpec, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rows.choose(logits_TE.contiguous(), spec, bias_E, self._live)

    def swiglu(self, x_TD: Tensor, w13: Matrix, w2: Matrix, gate: Matrix | None = None) -> Tensor:
        gate_TF, up_TF = self.linear(x_TD, w13).chunk(2, dim=-1)
        y_TD = self.linear(F.silu(gate_TF) * up_TF, w2)
        return y_TD if gate is None else y_TD * self.linear(x_TD, gate).sigmoid()

    def layer_experts(
        self, n_layers: int, n_experts: int, hidden_size: int, ffn_size: int, weight_format: WeightFormat
    ) -> list[LayerExperts]:
        pool = SlotPool(hidden_size, ffn_size, weight_format, self.device)
        count_LE = torch.zeros(n_layers, n_experts, dtype=torch.int64, device=self.device)
        return [
            CudaLayerExperts(index, count_LE, hidden_size, ffn_size, weight_format, pool) for index in range(n_layers)
        ]

    def rows_LE(self, layers: Sequence[LayerExperts]) -> Tensor:
        assert isinstance(layers[0], CudaLayerExperts)
        return layers[0].counted()

    def weighted_sum(self, parts: Sequence[Tensor], plan: Plan) -> Tensor:
        """By the kernel that adds up the rows of a step in one process, which adds in the order of places."""
        rows_PD = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
        place_P = to_device(torch.from_numpy(plan.place_TK).flatten(), rows_PD.device)
        weights_TK = to_device(torch.from_numpy(plan.weights_TK), rows_PD.device)
        place_TK = torch.arange(len(place_P), dtype=torch.int32, device=rows_PD.device).view(weights_TK.shape)
        in_order_PD = rows_PD.index_select(0, place_P)
        return rows.weighted_sum(Unsummed(in_order_PD, place_TK, weights_TK), rows_PD.dtype)

    def experts(
        self, layer: LayerExperts, x_TD: Tensor, token_P: Tensor, expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor:
        assert isinstance(layer, CudaLayerExperts)
        if missing := layer.missing(expert_P):
            raise KeyError(*missing)
        x_PD = x_TD.index_select(0, to_device(token_P, x_TD.device))
        y_PD = self.experts_fixed(layer, x_PD, to_device(expert_P, x_TD.device)[:, None])[0]
        return y_PD if out_PD is None else out_PD.copy_(y_PD)

    def experts_fixed(self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The unweighted rows of the pairs whose experts are held, [P, D], and where each pair's row is, int32 [P]; -1:
        it is not held. Nothing visits the host."""
        assert isinstance(layer, CudaLayerExperts)
        if x_TD.shape[0] == 0 or layer.empty:
            nobody = torch.full((ids_TK.numel(),), -1, dtype=torch.int32, device=x_TD.device)
            return x_TD.new_empty(ids_TK.numel(), x_TD.shape[1]), nobody
        slots = layer.slots
        given, scale_T = quantized_rows(x_TD) if slots.rows8 else (x_TD.contiguous(), None)
        y_PD, place_P = compute(given, ids_TK.contiguous(), slots, scale_T)
        return y_PD.to(x_TD.dtype), place_P

    def experts_combined(self, layer: LayerExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Delta:
        """Not added up yet: the norm that follows does that. Experts that are not held add nothing."""
        y_PD, place_P = self.experts_fixed(layer, x_TD, ids_TK)
        return Unsummed(y_PD, place_P.view(ids_TK.shape), weights_TK)

    def capture(self, function: Callable[[Ops], Result]) -> tuple[Graph, Result]:
        """Whatever `function` launches has to be compiled already, by a call that was not captured."""
        recording = CudaOps(self.device, self.dtype, self._live, self._most_items)
        return capture(lambda: function(recording), self._pool)


class _AttentionStep:
    """What one step's attention computes once for all layers."""

    def __init__(self, metadata: AttentionMetadata, rows_a_tile: int, block_size: int, most_items: int) -> None:
        self.metadata = metadata
        self.who = attention.who(
            metadata.sequence_T, metadata.position_T, metadata.block_table_SB, metadata.q_start, rows_a_tile,
            block_size, most_items,
        )  # fmt: skip
        self._items: dict[int | None, attention.Items | None] = {}

    def items(self, n_heads: int, head_dim: int, window: int | None) -> attention.Items | None:
        """The splits in layers with `window`."""
        if window not in self._items:
            self._items[window] = attention.make_items(self.who, n_heads, head_dim, window)
        return self._items[window]
