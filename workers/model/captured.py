"""Decoding steps of few rows, captured: what was a dozen small kernels a layer is then one call.

At a few rows the Python around the kernels takes as long as they do. The next step of as many rows runs the same
kernels on the same memory, so they are captured once and replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, cast

import torch

from workers.kernels.ops import Graph, Ops, Result
from workers.model.micro_batch import MicroBatch

_KEPT = 16  # numbers of rows and widths of the block table that come again
_FEWEST_BLOCKS = 8


class CapturedStep:
    """The memory that a step of one size works on, and the graphs that work on it."""

    def __init__(self, ops: Ops, batch: MicroBatch, n_blocks: int) -> None:
        metadata = batch.metadata
        self._ops = ops
        self._graphs: dict[Hashable, tuple[Graph, Any]] = {}
        self.batch = MicroBatch(
            x_TD=torch.empty_like(batch.x_TD),
            metadata=replace(
                metadata,
                block_table_SB=metadata.block_table_SB.new_zeros(len(metadata.block_table_SB), n_blocks),
                position_T=torch.empty_like(metadata.position_T),
                slot_T=torch.empty_like(metadata.slot_T),
            ),
            cos_Tr=torch.empty_like(batch.cos_Tr),
            sin_Tr=torch.empty_like(batch.sin_Tr),
            logit_rows_R=None,
        )
        self.delta_TD = torch.empty_like(batch.x_TD)

    def fill(self, batch: MicroBatch) -> None:
        """Copy a step's inputs to where the graphs look for them."""
        mine, to, new = self.batch, self.batch.metadata, batch.metadata
        for kept, value in (
            (mine.x_TD, batch.x_TD), (mine.cos_Tr, batch.cos_Tr), (mine.sin_Tr, batch.sin_Tr),
            (to.slot_T, new.slot_T), (to.position_T, new.position_T),
        ):  # fmt: skip
            kept.copy_(value)
        to.block_table_SB[:, : new.block_table_SB.shape[1]] = new.block_table_SB
        mine.handle = None

    def run(self, key: Hashable, function: Callable[[Ops], Result]) -> Result:
        """What `function` of the operations computes: captured when the key is new, then replayed."""
        if key not in self._graphs:
            self._graphs[key] = self._ops.capture(function)
        graph, result = self._graphs[key]
        graph.replay()
        return cast(Result, result)


class CapturedSteps:
    """The captured steps of a model, the last used ones."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._kept: OrderedDict[tuple[int, ...], CapturedStep] = OrderedDict()

    def takes(self, n_rows: int, n_sequences: int, n_logits: int) -> bool:
        """Whether a step is one of few rows that decode."""
        return n_rows <= self._ops.capture_rows and n_rows == n_sequences == n_logits

    def step(self, batch: MicroBatch, micro_batch: int) -> CapturedStep | None:
        """The step of this size, filled with `batch`; None where it is not one of few rows that decode.

        Micro-batches that are in flight together have memory of their own.
        """
        table_SB, n_rows = batch.metadata.block_table_SB, len(batch.x_TD)
        if batch.logit_rows_R is not None or not self.takes(n_rows, len(table_SB), n_rows):
            return None
        n_blocks = max(_FEWEST_BLOCKS, 1 << (table_SB.shape[1] - 1).bit_length())
        key = (micro_batch, n_rows, n_blocks, torch.get_num_threads())
        step = self._kept.pop(key, None) or CapturedStep(self._ops, batch, n_blocks)
        self._kept[key] = step
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        step.fill(batch)
        return step
