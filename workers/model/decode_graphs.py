"""Decoding steps captured whole: one CUDA graph for each size of batch, experts, head and all.

Legend: T rows of a graph, one per sequence, B blocks of the longest sequence, V vocabulary, N seats.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.device import to_device
from workers.kernels.cuda.ops import CudaOps
from workers.kernels.ops import AttentionMetadata, Graph, Ops
from workers.model.batch import Batch
from workers.model.decoder import Decoder
from workers.model.experts import Experts
from workers.model.routing import stacked

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_SPLIT = 256  # keys of a split, as the attention of a GPU counts them

# The rows of a graph's inputs; LIVE: how many of its rows are real, in the first column.
_TOKEN, _POSITION, _SLOT, _SEAT, _LIVE = range(5)


@dataclass(slots=True)
class _Captured:
    """One size: where a step's inputs go, whatever else the graph reads, and where its logits are."""

    inputs_5T: Tensor  # int64
    metadata: AttentionMetadata
    graph: Graph | None  # None: nothing is captured yet
    logits_TV: Tensor | None
    expert_ids: dict[int, Tensor]  # by layer, [T, K]
    key: Hashable  # what it is made for
    table_SB: Tensor | None = None  # what the block table was filled with last, on the host


def size_of(most_rows: int) -> int:
    """The size of the graph that holds `most_rows` rows."""
    return next((size for size in SIZES if size >= most_rows), SIZES[-1])


class DecodeGraphs:
    """The captured decoding steps of a model whose experts only launch.

    A sequence has a seat, in which the token that was drawn for it last is kept on the device: a step may be launched
    before the host knows what the one before it drew. Not thread-safe: one step loop owns it.
    """

    def __init__(self, model: Decoder, n_seats: int, max_context: int) -> None:
        assert isinstance(model.ops, CudaOps)
        self._model, self._ops = model, model.ops
        device, size = model.cache.device, model.cache.block_size
        self.last_N = torch.zeros(n_seats + 1, dtype=torch.int32, device=device)  # the last seat is nobody's
        self._n_seats, self._n_blocks = n_seats, -(-max_context // size)
        self._most_items = n_seats + 2 * model.cache.n_blocks * size // _SPLIT
        self._captured: dict[int, _Captured] = {}
        self._most_rows = 0
        self._last: _Captured | None = None  # that ran last

    def capture(
        self,
        most_rows: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        experts: Experts | None = None,
        key: Hashable = None,
    ) -> None:
        """Capture every size up to one that holds `most_rows`, the largest first: the others take its memory.

        experts, key: see `run`.
        """
        self.allow(most_rows)
        sizes = [size for size in reversed(SIZES) if size <= self._most_rows]
        for done, size in enumerate(sizes):
            progress(done, len(sizes))
            captured = self._captured[size] = self._make(size, key)
            self._compute(captured, self._ops_of(captured), experts)  # compiles what is not compiled yet
            torch.cuda.synchronize(self._model.cache.device)
            self._capture(captured, experts)
        progress(len(sizes), len(sizes))

    def allow(self, most_rows: int) -> None:
        """Take steps of up to `most_rows` rows. Those of a size that is not captured are when they are first run."""
        self._most_rows = size_of(most_rows)

    def takes(self, batch: Batch) -> bool:
        """Whether there is a graph for the batch: all rows decode and give logits, and not too many keys are seen."""
        n = batch.n_rows
        if n != len(batch.context_S) or n != len(batch.logit_rows_R) or n > self._most_rows:
            return False
        n_splits = int(batch.context_S.sum()) // _SPLIT + n
        return n_splits <= self._most_items and batch.block_table_SB.shape[1] <= self._n_blocks

    def run(self, batch: Batch, seats: Sequence[int], experts: Experts | None = None, key: Hashable = None) -> Tensor:
        """Launch a step that `takes` allows: its logits, float32 [rows, V], which the next `run` overwrites.

        A token id of -1 is the one in the seat. experts: what it is captured with, which must only launch; None: the
        model's. key: what a capture of it is of use for; one that was made for another is made anew.
        """
        n = batch.n_rows
        captured = self._captured.get(size := size_of(n))
        if captured is None or captured.key != key:
            captured = self._captured[size] = self._make(size, key)
        self._last = captured
        host_5T = torch.zeros(captured.inputs_5T.shape, dtype=torch.int64, pin_memory=captured.inputs_5T.is_cuda)
        host_5T[_POSITION : _SLOT + 1] = -1
        host_5T[_SEAT] = self._n_seats
        host_5T[_TOKEN, :n], host_5T[_POSITION, :n], host_5T[_SLOT, :n] = (
            batch.token_ids_T, batch.positions_T, batch.slots_T
        )  # fmt: skip
        host_5T[_SEAT, :n] = torch.tensor(seats)
        host_5T[_LIVE, 0] = n
        captured.inputs_5T.copy_(host_5T, non_blocking=True)
        table_SB, table_TB = batch.block_table_SB, captured.metadata.block_table_SB
        if captured.table_SB is None or not torch.equal(captured.table_SB, table_SB):  # mostly no block was added
            table_TB[:n, : table_SB.shape[1]] = to_device(table_SB, table_TB.device)
            captured.table_SB = table_SB
        if captured.graph is not None and captured.logits_TV is not None:
            captured.graph.replay()
            return captured.logits_TV[:n]
        logits_TV = self._compute(captured, self._ops_of(captured), experts)
        ids = dict(captured.expert_ids)
        self._capture(captured, experts)
        for layer, ids_TK in ids.items():  # `routing` looks where a replay would have put them
            captured.expert_ids[layer].copy_(ids_TK)
        return logits_TV[:n]

    def routing(self, n_rows: int) -> Tensor:
        """Launch a copy of the experts that the first rows of the last `run` chose: int16 [n_rows, L, K]."""
        assert self._last is not None
        ids = {layer: ids_TK[:n_rows] for layer, ids_TK in self._last.expert_ids.items()}
        return stacked(ids, self._model.spec.n_layers)

    def known(self, token_T: Tensor, seat_T: Tensor) -> Tensor:
        """The token ids, with those of -1 taken from their seats; all on the device."""
        return torch.where(token_T < 0, self.last_N[seat_T].to(torch.int64), token_T)

    def _make(self, n_rows: int, key: Hashable) -> _Captured:
        """The memory of a size, nothing captured."""
        device = self._model.cache.device
        inputs_5T = torch.zeros(5, n_rows, dtype=torch.int64, device=device)
        inputs_5T[_POSITION : _SLOT + 1] = -1
        inputs_5T[_SEAT] = self._n_seats
        table_TB = torch.zeros(n_rows, self._n_blocks, dtype=torch.int32, device=device)
        metadata = AttentionMetadata(
            table_TB, torch.arange(n_rows, device=device), inputs_5T[_POSITION], inputs_5T[_SLOT],
            tuple(range(n_rows + 1)),
        )  # fmt: skip

        return _Captured(inputs_5T, metadata, None, None, {}, key)

    def _ops_of(self, captured: _Captured) -> CudaOps:
        return self._ops.padded(captured.inputs_5T[_LIVE], self._most_items)

    def _compute(self, captured: _Captured, ops: Ops, experts: Experts | None) -> Tensor:
        """The logits of what lies in the inputs; float32 [T, V]."""
        inputs_5T = captured.inputs_5T
        token_T = self.known(inputs_5T[_TOKEN], inputs_5T[_SEAT])
        return self._model.compute(ops, token_T, captured.metadata, experts=experts, expert_ids=captured.expert_ids)

    def _capture(self, captured: _Captured, experts: Experts | None) -> None:
        """Note what `_compute` launches, which it has done before; nothing runs."""
        ops = self._ops_of(captured)
        captured.graph, captured.logits_TV = ops.capture(lambda noted: self._compute(captured, noted, experts))
