"""The dense half of one decoder layer.

Shape legend: T rows, D hidden, H query heads, G key/value heads, d head size, C = (H + 2G) * d, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.checkpoint import DenseLayer
from workers.kernels.attention import rotary_write
from workers.kernels.gate import gate_top_k
from workers.kernels.linear import PackedLinear
from workers.kernels.norm import add_rms_norm, rms_norm
from workers.model.attention import attend
from workers.model.flow import Flow
from workers.model.kv_cache import KVCache
from workers.spec import ModelSpec


class DecoderLayer:
    """Attention and gate of one layer; its experts are elsewhere."""

    def __init__(self, index: int, spec: ModelSpec, weights: DenseLayer, cache: KVCache) -> None:
        device = cache.device
        self.index = index
        self._last = index == spec.n_layers - 1
        self._cache = cache
        self._eps = spec.norm_eps
        self._top_k = spec.top_k
        self._window = spec.sliding_window
        self._input_norm_D = weights.input_norm_D.to(device)
        self._post_norm_D = weights.post_norm_D.to(device)
        self._qkv = PackedLinear(torch.cat((weights.q, weights.k, weights.v)).to(device))
        self._o = PackedLinear(weights.o.to(device))
        assert weights.gate_ED is not None
        self._gate = PackedLinear(weights.gate_ED.to(device))

    def attend(self, flow: Flow, delta_TD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Add `delta`, what the experts of the layer before gave, to the residual stream, then attention.

        Returns what the experts of this layer are asked: rows x [T, D], expert ids [T, K], their weights [T, K].
        After the last layer's attention only the rows whose logits are wanted go on.
        """
        if flow.recorded is not None:
            return flow.recorded.run(self.index, self._attend, delta_TD)
        return self._attend(flow, delta_TD)

    def _attend(self, flow: Flow, delta_TD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if delta_TD is None:
            x_TD = rms_norm(flow.x_TD, self._input_norm_D, self._eps)
        else:
            x_TD = add_rms_norm(flow.x_TD, delta_TD, self._input_norm_D, self._eps)
        k_cache, v_cache = self._cache.k[self.index], self._cache.v[self.index]
        q_THd = rotary_write(self._qkv(x_TD), flow.rows_T, flow.slots_T, flow.cos_Td, flow.sin_Td, k_cache, v_cache)
        attention_TC = attend(flow.plan, self._cache, self.index, q_THd, self._window).flatten(1)
        if self._last and flow.logit_rows_R is not None:
            attention_TC = attention_TC.index_select(0, flow.logit_rows_R)
            flow.x_TD = flow.x_TD.index_select(0, flow.logit_rows_R)
        x_TD = add_rms_norm(flow.x_TD, self._o(attention_TC), self._post_norm_D, self._eps)
        expert_ids_TK, weights_TK = gate_top_k(self._gate(x_TD), self._top_k)
        return x_TD, expert_ids_TK, weights_TK
