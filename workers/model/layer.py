"""The dense half of one decoder layer.

Shape legend: T rows, D hidden, H query heads, G key/value heads, d head size, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.checkpoint import DenseLayer
from workers.gate_spec import GateSpec
from workers.kernels.ops import Delta, Ops
from workers.model.kv_cache import KVCache
from workers.model.micro_batch import MicroBatch
from workers.spec import ModelSpec


class DecoderLayer:
    """Attention and gate of one layer; its experts are elsewhere."""

    def __init__(self, index: int, spec: ModelSpec, weights: DenseLayer, cache: KVCache, ops: Ops) -> None:
        self.index = index
        self._last = index == spec.n_layers - 1
        self._k_cache, self._v_cache = cache.k[index], cache.v[index]
        self._eps = spec.norm_eps
        self._gate_spec = GateSpec(spec.top_k)
        self._window = spec.sliding_window
        self._scale = spec.head_dim**-0.5
        self._input_norm_D = weights.input_norm_D.to(cache.device)
        self._post_norm_D = weights.post_norm_D.to(cache.device)
        self._qkv = ops.matrix(torch.cat((weights.q, weights.k, weights.v)))
        self._o = ops.matrix(weights.o)
        self._gate = ops.matrix(weights.gate_ED)

    def attend(self, ops: Ops, batch: MicroBatch, delta: Delta | None) -> tuple[Tensor, Tensor, Tensor]:
        """Add `delta`, what the experts of the layer before gave, to the residual stream, then attention.

        Returns what the experts of this layer are asked: rows x [T, D], expert ids [T, K], their weights [T, K].
        After the last layer's attention only the rows whose logits are wanted go on.
        """
        if delta is None:
            x_TD = ops.rms_norm(batch.x_TD, self._input_norm_D, self._eps)
        else:
            x_TD = ops.add_rms_norm(batch.x_TD, delta, self._input_norm_D, self._eps)
        qkv_TX, metadata, caches = ops.linear(x_TD, self._qkv), batch.metadata, (self._k_cache, self._v_cache)
        q_THd = ops.rotary_write(qkv_TX, metadata, batch.cos_Tr, batch.sin_Tr, *caches)
        attention_TC = ops.attention(q_THd, *caches, metadata, self._scale, self._window).flatten(1)
        if self._last and batch.logit_rows_R is not None:
            attention_TC = attention_TC.index_select(0, batch.logit_rows_R)
            batch.x_TD = batch.x_TD.index_select(0, batch.logit_rows_R)
        delta_TD = ops.linear(attention_TC, self._o)
        return ops.add_norm_gate(batch.x_TD, delta_TD, self._post_norm_D, self._eps, self._gate, self._gate_spec)
