"""A decoder-only transformer whose experts are an argument, so that they can be anywhere.

Shape legend: T rows of a micro-batch, D hidden size, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.checkpoint import DenseWeights
from workers.kernels.linear import PackedLinear
from workers.kernels.norm import add_rms_norm
from workers.model.attention import make_plan
from workers.model.batch import Batch
from workers.model.experts import Experts
from workers.model.flow import Flow
from workers.model.kv_cache import KVCache
from workers.model.layer import DecoderLayer
from workers.model.recorded import Recorder
from workers.model.rope import Rope
from workers.spec import ModelSpec


class Decoder:
    """The model of a router. It computes where the cache lives, in the dtype of the norms.

    Not thread-safe: one step loop owns it.
    """

    def __init__(self, spec: ModelSpec, dense: DenseWeights, experts: Experts, cache: KVCache) -> None:
        self.spec = spec
        self.experts = experts
        self.cache = cache
        self._rope = Rope(spec, cache.device)
        self._embed_VD = dense.embed_VD.to(cache.device)
        self._layers = [DecoderLayer(index, spec, weights, cache) for index, weights in enumerate(dense.layers)]
        self._norm_D = dense.norm_D.to(cache.device)
        self._recorder = Recorder()
        self._head = PackedLinear(dense.head_VD.to(cache.device))

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> Tensor:
        """One step over one or more micro-batches. Returns the wanted logits, float32 [R, V], batch after batch.

        While the experts compute one micro-batch, the attention of the next one runs. A sequence may lie in several
        micro-batches, in the order of its rows.
        """
        experts, flows = self.experts, [self._recorder.flow(self._begin(b), i) for i, b in enumerate(batches)]
        for layer in self._layers:
            for flow in flows:
                delta_TD = None if flow.handle is None else experts.combine(flow.handle)
                flow.handle = experts.dispatch(layer.index, *layer.attend(flow, delta_TD))
        logits = [self._logits(flow, experts.combine(flow.handle)) for flow in flows]
        return logits[0] if len(logits) == 1 else torch.cat(logits)  # a copy of one would cost as much as a layer

    def _begin(self, batch: Batch) -> Flow:
        """Everything that is the same in all layers."""
        device, n_rows = self.cache.device, batch.n_rows
        cos_Td, sin_Td = self._rope.angles(batch.positions_T.to(device))
        return Flow(
            x_TD=self._embed_VD.index_select(0, batch.token_ids_T.to(device)).to(self._norm_D.dtype),
            plan=make_plan(batch, self.cache, self.spec.sliding_window),
            slots_T=batch.slots_T.to(device),
            rows_T=torch.arange(n_rows, device=device),
            cos_Td=cos_Td,
            sin_Td=sin_Td,
            logit_rows_R=None if len(batch.logit_rows_R) == n_rows else batch.logit_rows_R.to(device),
        )

    def _logits(self, flow: Flow, delta_RD: Tensor) -> Tensor:
        return self._head(add_rms_norm(flow.x_TD, delta_RD, self._norm_D, self.spec.norm_eps)).float()
