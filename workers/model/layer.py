"""One decoder layer, all but its experts.

Shape legend: T rows, D hidden, H query heads, G key/value heads, d head size, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.checkpoint import DenseLayer
from workers.kernels.ops import Delta, Ops, QKNorm
from workers.model.ffn import FFN
from workers.model.kv_cache import KVCache
from workers.model.micro_batch import MicroBatch
from workers.spec import ModelSpec

Asked = tuple[Tensor, Tensor, Tensor]  # what a layer's experts are asked: rows x [T, D], ids [T, K], weights [T, K]


class DecoderLayer:
    """Attention, gate, and the FFN of a layer without experts or beside them; the experts are elsewhere."""

    def __init__(self, index: int, spec: ModelSpec, weights: DenseLayer, cache: KVCache, ops: Ops) -> None:
        self.index = index
        self._last = index == spec.n_layers - 1
        self._k_cache, self._v_cache = cache.k[index], cache.v[index]
        self._eps, self._residual_scale = spec.norm_eps, spec.residual_scale
        self._window, self._scale, self._gate_spec = spec.window(index), spec.scale, spec.gate
        self._input_norm_D = weights.input_norm_D.to(cache.device)
        self._post_norm_D = weights.post_norm_D.to(cache.device)
        biases = [bias for bias in (weights.q_bias, weights.k_bias, weights.v_bias) if bias is not None]
        qkv = torch.cat((weights.q, weights.k, weights.v))
        self._qkv = ops.matrix(qkv, torch.cat(biases) if biases else None)
        self._qk_norm = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._qk_norm = QKNorm(weights.q_norm.to(cache.device), weights.k_norm.to(cache.device), self._eps)
        self._o = ops.matrix(weights.o)
        self._gate = None if weights.gate_ED is None else ops.matrix(weights.gate_ED)
        self._gate_bias_E = None if weights.gate_bias_E is None else weights.gate_bias_E.to(cache.device)
        self.ffn = None if weights.ffn is None else FFN(weights.ffn, weights.shared_gate_1D, ops)

    def attend(self, ops: Ops, batch: MicroBatch, delta: Delta | None) -> Asked | None:
        """Add `delta`, what the experts of the layer before gave, to the residual stream, then attention.

        Returns what the experts of this layer are asked. A layer without any does its FFN too and returns None.
        After the last layer's attention only the rows whose logits are wanted go on.
        """
        if delta is None:
            x_TD = ops.rms_norm(batch.x_TD, self._input_norm_D, self._eps)
        else:
            x_TD = ops.add_rms_norm(batch.x_TD, delta, self._input_norm_D, self._eps, self._residual_scale)
        qkv_TX, metadata, caches = ops.linear(x_TD, self._qkv), batch.metadata, (self._k_cache, self._v_cache)
        q_THd = ops.rotary_write(qkv_TX, metadata, batch.cos_Tr, batch.sin_Tr, *caches, self._qk_norm)
        attention_TC = ops.attention(q_THd, *caches, metadata, self._scale, self._window).flatten(1)
        if self._last and batch.logit_rows_R is not None:
            attention_TC = attention_TC.index_select(0, batch.logit_rows_R)
            batch.x_TD = batch.x_TD.index_select(0, batch.logit_rows_R)
        delta_TD, weight_D = ops.linear(attention_TC, self._o), self._post_norm_D
        if self._gate is None:
            x_TD = ops.add_rms_norm(batch.x_TD, delta_TD, weight_D, self._eps, self._residual_scale)
            self.feed_forward(ops, batch, x_TD)
            return None
        return ops.add_norm_gate(
            batch.x_TD, delta_TD, weight_D, self._eps, self._gate, self._gate_spec, self._gate_bias_E,
            self._residual_scale,
        )  # fmt: skip

    def feed_forward(self, ops: Ops, batch: MicroBatch, x_TD: Tensor) -> None:
        """Add to the residual stream what the FFN makes of `x`: of a layer without experts, or beside them."""
        assert self.ffn is not None
        ops.add(batch.x_TD, self.ffn(ops, x_TD), self._residual_scale)
