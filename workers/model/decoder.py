"""A decoder-only transformer whose experts are an argument, so that they can be anywhere.

Shape legend: T rows of a micro-batch, D hidden size, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.checkpoint import DenseWeights
from workers.device import to_device
from workers.kernels.ops import AttentionMetadata, Delta, Ops
from workers.kernels.select import ops_for
from workers.model.batch import Batch
from workers.model.captured import CapturedStep, CapturedSteps
from workers.model.experts import Experts
from workers.model.kv_cache import KVCache
from workers.model.layer import Asked, DecoderLayer
from workers.model.micro_batch import MicroBatch
from workers.model.observer import RoutingObserver
from workers.model.rope import Rope
from workers.model.routing import stacked
from workers.spec import ModelSpec


class Decoder:
    """The model of a router. It computes where the cache lives, in the dtype of the norms.

    Not thread-safe: one step loop owns it.
    """

    def __init__(self, spec: ModelSpec, dense: DenseWeights, experts: Experts, cache: KVCache) -> None:
        self.spec = spec
        self.experts = experts
        self.cache = cache
        self._ops = ops_for(cache.device, cache.dtype)
        self._rope = Rope(spec, cache.device)
        self._embed_VD = dense.embed_VD.to(cache.device)
        self._layers = [
            DecoderLayer(index, spec, weights, cache, self._ops) for index, weights in enumerate(dense.layers)
        ]
        self._norm_D = dense.norm_D.to(cache.device)
        self._captured = CapturedSteps(self._ops)
        self._routed: list[dict[int, Tensor]] = []  # of the last step: by micro-batch and layer, the experts chosen
        self._head = self._ops.matrix(dense.head_VD)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], observer: RoutingObserver | None = None) -> Tensor:
        """One step over one or more micro-batches. Returns the wanted logits, float32 [R, V], batch after batch.

        While the experts compute one micro-batch, the attention of the next one runs. A sequence may lie in several
        micro-batches, in the order of its rows. `observer` is told what the gates choose.
        """
        routing = any(batch.routing for batch in batches)
        begun = [self._begin(batch) for batch in batches]
        steps = [self._captured.step(batch, number) for number, batch in enumerate(begun)]
        whole = steps[0] if len(steps) == 1 and observer is None else None
        if whole is not None and self.experts.by(self._ops) is not None:
            x_RD, ids_by_layer = whole.run(
                "layers", lambda ops: self._through_layers(ops, self.experts.by(ops), whole.batch)
            )
            self._routed = [ids_by_layer]
            return self._logits(self._ops, x_RD)
        flights = [(batch if step is None else step.batch, step) for batch, step in zip(begun, steps, strict=True)]
        self._routed = [{} for _ in flights]
        for layer in self._layers:
            for (batch, step), ids_by_layer in zip(flights, self._routed, strict=True):
                if (asked := self._attend(layer, batch, step)) is None:
                    continue
                batch.handle = self.experts.dispatch(layer.index, *asked)
                if routing:
                    ids_by_layer[layer.index] = self._wanted(batch, layer.index, asked[1])
                if observer is not None:
                    q_start = batch.metadata.q_start
                    observer.chosen(layer.index, q_start if len(asked[1]) == q_start[-1] else None, *asked[1:])
                if layer.ffn is not None:  # while the experts compute
                    self._feed_forward(layer, batch, step, asked[0])
        logits = [self._logits(self._ops, self._normed(self._ops, batch, self.experts)) for batch, _ in flights]
        return logits[0] if len(logits) == 1 else torch.cat(logits)  # a copy of one would cost as much as a layer

    def routing(self) -> Tensor:
        """The experts of the rows whose logits the last `forward` gave, int16 [R, L, K]; see `routing.stacked`.

        Where its batches asked for it, in a model that has experts; before the next `forward`.
        """
        return torch.cat([stacked(ids_by_layer, self.spec.n_layers) for ids_by_layer in self._routed])

    def _wanted(self, batch: MicroBatch, layer: int, ids_TK: Tensor) -> Tensor:
        """The choices of the rows that give logits, [R, K]; the last layer has no others."""
        rows_R = None if layer == self.spec.n_layers - 1 else batch.logit_rows_R
        return ids_TK if rows_R is None else ids_TK.index_select(0, rows_R)

    @torch.no_grad()
    def compute(
        self,
        ops: Ops,
        token_T: Tensor,
        metadata: AttentionMetadata,
        logit_rows_R: Tensor | None = None,
        experts: Experts | None = None,
        expert_ids: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """One micro-batch by `ops`, layer after layer: the wanted logits, float32 [R, V]. Everything is on the
        device, so that all of it only launches where the experts do.

        token_T: int64. logit_rows_R: None means all rows. experts: None means the model's. expert_ids: where the
        choices of all rows are put, [T, K], by layer.
        """
        batch = self._micro_batch(token_T, metadata, logit_rows_R)
        x_RD, ids_by_layer = self._through_layers(ops, experts or self.experts, batch)
        if expert_ids is not None:
            expert_ids.update(ids_by_layer)
        return self._logits(ops, x_RD)

    def _through_layers(self, ops: Ops, experts: Experts | None, batch: MicroBatch) -> tuple[Tensor, dict[int, Tensor]]:
        """The normalised rows whose logits are wanted; and by layer the experts of each row.

        Where it is captured, all of it is the graph's own memory: every replay writes to it.
        """
        assert experts is not None
        ids_by_layer: dict[int, Tensor] = {}
        for layer in self._layers:
            if (asked := layer.attend(ops, batch, _combine(experts, batch))) is None:
                continue
            batch.handle = experts.dispatch(layer.index, *asked)
            ids_by_layer[layer.index] = asked[1]
            if layer.ffn is not None:
                layer.feed_forward(ops, batch, asked[0])
        return self._normed(ops, batch, experts), ids_by_layer

    def captures(self, batch: Batch) -> bool:
        """Whether `batch`, as the only one of a step, is computed by captured calls."""
        return self._captured.takes(batch.n_rows, len(batch.block_table_SB), len(batch.logit_rows_R))

    @property
    def ops(self) -> Ops:
        """The operations of its device."""
        return self._ops

    def _attend(self, layer: DecoderLayer, batch: MicroBatch, step: CapturedStep | None) -> Asked | None:
        delta = _combine(self.experts, batch)
        if step is None:
            return layer.attend(self._ops, batch, delta)
        if delta is None:
            return step.run(layer.index, lambda ops: layer.attend(ops, batch, None))
        assert isinstance(delta, Tensor)
        step.delta_TD.copy_(delta)
        return step.run(layer.index, lambda ops: layer.attend(ops, batch, step.delta_TD))

    def _feed_forward(self, layer: DecoderLayer, batch: MicroBatch, step: CapturedStep | None, x_TD: Tensor) -> None:
        if step is None:
            layer.feed_forward(self._ops, batch, x_TD)
        else:
            step.run((layer.index, "ffn"), lambda ops: layer.feed_forward(ops, batch, x_TD))

    def _begin(self, batch: Batch) -> MicroBatch:
        """A micro-batch whose inputs are on the device."""
        device, n_rows = self.cache.device, batch.n_rows
        q_start = torch.tensor(batch.q_start)
        n_sequences = len(q_start) - 1
        sequence_T = torch.arange(n_sequences)
        if n_rows != n_sequences:
            sequence_T = sequence_T.repeat_interleave(q_start.diff())
        metadata = AttentionMetadata(
            block_table_SB=to_device(batch.block_table_SB.to(torch.int32), device).contiguous(),
            sequence_T=to_device(sequence_T, device),
            position_T=to_device(batch.positions_T, device).contiguous(),
            slot_T=to_device(batch.slots_T, device).contiguous(),
            q_start=batch.q_start,
        )
        every = len(batch.logit_rows_R) == n_rows
        logit_rows_R = None if every else to_device(batch.logit_rows_R, device)
        return self._micro_batch(to_device(batch.token_ids_T, device), metadata, logit_rows_R)

    def _micro_batch(self, token_T: Tensor, metadata: AttentionMetadata, logit_rows_R: Tensor | None) -> MicroBatch:
        """Everything that is the same in all layers."""
        cos_Tr, sin_Tr = self._rope.angles(metadata.position_T)
        x_TD = self._embed_VD.index_select(0, token_T).to(self._norm_D.dtype)
        if self.spec.embed_scale != 1:
            x_TD = x_TD * self.spec.embed_scale
        return MicroBatch(x_TD=x_TD, metadata=metadata, cos_Tr=cos_Tr, sin_Tr=sin_Tr, logit_rows_R=logit_rows_R)

    def _normed(self, ops: Ops, batch: MicroBatch, experts: Experts) -> Tensor:
        """What the head is given, [R, D]: the residual stream with what the last layer's experts gave, normalised."""
        spec, delta = self.spec, _combine(experts, batch)
        if delta is None:
            return ops.rms_norm(batch.x_TD, self._norm_D, spec.norm_eps)
        return ops.add_rms_norm(batch.x_TD, delta, self._norm_D, spec.norm_eps, spec.residual_scale)

    def _logits(self, ops: Ops, x_RD: Tensor) -> Tensor:
        logits_RV = ops.linear(x_RD, self._head).float()
        return logits_RV if self.spec.logits_scaling == 1 else logits_RV / self.spec.logits_scaling


def _combine(experts: Experts, batch: MicroBatch) -> Delta | None:
    """What the experts of the last layer that has any gave; None where that is taken already."""
    handle, batch.handle = batch.handle, None
    delta: Delta | None = None if handle is None else experts.combine(handle)
    return delta
