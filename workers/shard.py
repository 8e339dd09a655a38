"""ExpertShard: the experts that one process holds, on one device. Knows no Ray and no gRPC.

Legend: T token rows, P (token, expert) pairs, K choices a token, D hidden, F ffn.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.errors import ExpertNotHeld
from workers.kernels.memory import empty_weights, give_back
from workers.kernels.mutex import Mutex
from workers.kernels.ops import Delta, Ops, RingLoop, Rings, unsummed
from workers.kernels.select import formats_for, ops_for
from workers.kernels.sizes import powers_up_to
from workers.weights import Matrix, WeightFormat, format_of, kept_in

if TYPE_CHECKING:
    from workers.checkpoint import Checkpoint, ExpertWeights
    from workers.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one replica: which expert it is, its size in bytes and the rows it computed since it was loaded."""

    layer: int
    expert: int
    weight_bytes: int
    rows: int


class ExpertShard:
    """Slots with the weights of `(layer, expert)` replicas, and the grouped SwiGLU over them.

    `forward` is what an expert worker serves; `dispatch`/`combine` make the shard the `Experts` of a one-process model.
    One thread may load and unload while another computes; a forward sees a layer as it was when it began.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weight_format: WeightFormat | None = None,
    ) -> None:
        """`dtype`: what to compute in. `weight_format`: what weights are kept in, one of `formats_for` the device; by
        default `dtype`."""
        self.device = torch.device(device)
        self.dtype = dtype or spec.dtype
        self._ops = ops_for(self.device, self.dtype)
        self.format = weight_format or format_of(self.dtype)
        #: What `load` is to be given.
        self.read_as = self.format.made_of(self.dtype)
        self.n_layers = spec.n_layers
        self.layers = tuple(sorted({layer for layer, _ in spec.experts}))  # those that have experts
        self.n_experts = spec.n_experts
        self.hidden_size = spec.hidden_size
        self.ffn_size = spec.ffn_size
        self._layers = self._ops.layer_experts(
            spec.n_layers, spec.n_experts, spec.hidden_size, spec.ffn_size, self.format
        )
        self._answers = self._ops.answers(self._layers)
        self.only_launches = self.device.type == "cuda" and self._ops.exact_rows
        self._lock = Mutex()  # held while a layer computes, or changes what it holds

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot, ascending by (layer, expert)."""
        rows_LE = self.rows_LE()
        return tuple(
            Slot(layer, expert, self.expert_bytes, int(rows_LE[layer, expert])) for layer, expert in sorted(self.held)
        )

    @property
    def held(self) -> frozenset[tuple[int, int]]:
        """The (layer, expert) pairs that have a slot. Known on the host."""
        return frozenset((index, expert) for index, layer in enumerate(self._layers) for expert in layer.held)

    def rows_LE(self) -> NDArray[np.int64]:
        """Rows that each expert computed since it was loaded, [layers, experts]; 0 for those that are not held. From
        any thread; waits for nothing that is computed."""
        counted: NDArray[np.int64] = self._ops.rows_LE(self._layers).numpy()
        return counted

    @property
    def expert_bytes(self) -> int:
        """Bytes that one replica takes."""
        return self._layers[0].expert_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of expert weights resident on the device."""
        return self.expert_bytes * sum(len(layer.held) for layer in self._layers)

    @property
    def n_held(self) -> int:
        """How many experts are held, over all layers."""
        return sum(len(layer.held) for layer in self._layers)

    def reserve(self, n_experts: int) -> None:
        """Say how many experts are to be held at most, over all layers, so that their memory is taken once."""
        with self._lock:
            self._layers[0].reserve(n_experts)

    def warm_up(self, most_pairs: int) -> None:
        """Compile what requests of up to so many pairs take, where that is done when it is first used: the first
        request of every size would wait for it. Nothing is counted."""
        with torch.inference_mode():
            for n in powers_up_to(most_pairs) if self.only_launches else ():
                x_ND = torch.zeros(n, self.hidden_size, dtype=self.dtype, device=self.device)
                self.fixed(self.layers[0], x_ND, torch.full((n, 1), -1, dtype=torch.int64, device=self.device))

    def load(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Put a replica of `(layer, expert)` on the device, in the shard's format; replaces one that is there."""
        f, d = self.ffn_size, self.hidden_size
        memory = empty_weights(3 * f * d, self.read_as.dtype, self.device)
        w13_2FD, w2_DF = memory[: 2 * f * d].view(2 * f, d), memory[2 * f * d :].view(d, f)
        w13_2FD[:f], w13_2FD[f:] = weights.w1_FD, weights.w3_FD
        w2_DF.copy_(weights.w2_DF)
        w13, w2 = self.format.make(w13_2FD), self.format.make(w2_DF)
        with self._lock:
            self._layers[layer].put(expert, w13, w2)

    def unload(self, layer: int, expert: int) -> None:
        """Free the replica of `(layer, expert)`. Raises ExpertNotHeld when there is none."""
        with self._lock:
            if expert not in self._layers[layer].held:
                raise ExpertNotHeld(layer, (expert,))
            self._layers[layer].drop(expert)

    def weights(self, layer: int) -> Mapping[int, tuple[Matrix, Matrix]]:
        """w13 [2F, D] and w2 [D, F] of every expert of `layer` that is held, by expert."""
        return self._layers[layer].weights

    def forward(
        self, layer: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor:
        """`y[p] = expert(expert_P[p])(x[token_P[p]])`, unweighted, in the shard's dtype. [P, D]: `out_PD` if given.

        x_TD is in the shard's dtype on its device; token_P and expert_P are int32 or int64, and expert_P ascends.
        Raises ExpertNotHeld when an expert has no slot here.
        """
        with self._lock:
            try:
                return self._ops.experts(self._layers[layer], x_TD, token_P, expert_P, out_PD)
            except KeyError as error:
                raise ExpertNotHeld(layer, error.args) from None

    def fixed(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The unweighted rows of all pairs whose expert is held, [n, D], and where each pair's row is, int32 [T * K].

        ids_TK: int32 or int64; a pair whose expert is not held, or below 0, has place -1. Where `only_launches`, shapes
        depend on T and K alone.
        """
        if self.only_launches:
            y_PD, place_TK, _ = unsummed(self._ops.experts_combined(self._layers[layer], x_TD, ids_TK, ids_TK))
            return y_PD, place_TK.flatten()
        ids_P = ids_TK.flatten()
        held = torch.tensor(sorted(self._layers[layer].held), dtype=ids_P.dtype, device=ids_P.device)
        pair_P = torch.nonzero(torch.isin(ids_P, held)).flatten()
        pair_P = pair_P[torch.argsort(ids_P[pair_P], stable=True)]
        y_PD = self.forward(layer, x_TD, pair_P // ids_TK.shape[1], ids_P[pair_P])
        place_P = torch.full(ids_P.shape, -1, dtype=torch.int32, device=ids_P.device)
        place_P[pair_P] = torch.arange(len(pair_P), dtype=torch.int32, device=ids_P.device)
        return y_PD, place_P

    def answer(self, message: memoryview) -> memoryview | None:
        """The reply to a whole REQUEST of `wire` with few rows; None: it has to be parsed and given to `forward`."""
        if self._answers is None:
            return None
        with self._lock:
            return self._answers.answer(message)

    def loop(self, rings: Rings, threads: int, cores: int, computing: Mutex, counts: array[int]) -> RingLoop | None:
        """What answers whole requests of few rows by itself, from one ring to another; None: nothing does.

        `computing`: held meanwhile, beside the shard's own lock. The others: see `Answers.loop`.
        """
        if self._answers is None:
            return None
        return self._answers.loop(rings, threads, cores, (computing, self._lock), counts)

    def by(self, ops: Ops) -> ExpertShard:
        """The same slots, computed by other operations of the same device. Slots must not change while a graph runs."""
        view = copy(self)  # of the handle: slots, counters and lock are the same
        view._ops = ops
        return view

    def begin_step(self, step: int) -> None:
        """Nothing to do: nothing outlives a dispatch in one process."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Delta:
        """Compute the experts of `layer` at once; the handle is the result. See `workers.model.experts.Experts`."""
        with self._lock:
            try:
                return self._ops.experts_combined(self._layers[layer], x_TD, expert_ids_TK, weights_TK)
            except KeyError as error:
                raise ExpertNotHeld(layer, error.args) from None

    def combine(self, handle: Delta) -> Delta:
        """y_TD, in the dtype of the dispatched rows: the weighted sum, added in expert order in float32."""
        return handle

    def micro_batches(self, n_rows: int) -> int:
        """One: there is nothing to overlap in one process."""
        return 1


def load_shard(
    source: Checkpoint,
    experts: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    weight_format: WeightFormat | None = None,
    n_slots: int = 0,
) -> ExpertShard:
    """A shard with `experts`, (layer, expert) pairs, on the device that `source` reads to, computing in `dtype`; no
    other tensor is read. weight_format: by default that of the files, if it can stay. n_slots: how many experts it is
    to have room for, at least.

    Raises CheckpointError.
    """
    weight_format = weight_format or kept_in(source.expert_format, formats_for(source.device, dtype), dtype)
    shard = ExpertShard(source.spec, source.device, dtype, weight_format)
    wanted = tuple(experts)
    shard.reserve(max(n_slots, len(wanted)))
    for layer, expert in wanted:
        shard.load(layer, expert, source.expert(layer, expert, shard.read_as))
    give_back()
    return shard
