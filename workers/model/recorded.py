"""A decoding step of few rows, recorded: what a layer does before its experts is then one call.

At a few rows the Python around ten small kernels a layer takes as long as some of them. The next step of as many
rows runs the same kernels on the same memory, so they are recorded once and repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from workers.kernels.linear import is_fast
from workers.kernels.native import FEW_ROWS, Tape
from workers.model.attention import AttentionPlan, Decode
from workers.model.flow import Flow

_KEPT = 16  # recordings: numbers of rows and widths of the block table that come again
_FEWEST_BLOCKS = 8

Asked = tuple[Tensor, Tensor, Tensor]  # what a layer's experts are asked: rows, expert ids, weights


class Recorded:
    """The memory that a step of one size works on, and each layer's kernels on it.

    Shape legend: T rows, one per sequence, D hidden size, B blocks a sequence.
    """

    def __init__(self, flow: Flow, decode: Decode, n_blocks: int) -> None:
        table_TB = torch.zeros(len(flow.x_TD), n_blocks, dtype=torch.int32)
        self._decode = replace(decode, block_table_SB=table_TB, position_S=torch.empty_like(decode.position_S))
        self._delta_TD = torch.empty_like(flow.x_TD)
        self._layers: dict[int, tuple[Tape, Asked]] = {}
        self._flow = Flow(
            x_TD=torch.empty_like(flow.x_TD),
            plan=AttentionPlan(self._decode, ()),
            slots_T=torch.empty_like(flow.slots_T),
            rows_T=flow.rows_T,
            cos_Td=torch.empty_like(flow.cos_Td),
            sin_Td=torch.empty_like(flow.sin_Td),
            logit_rows_R=None,
            recorded=self,
        )

    def fill(self, flow: Flow, decode: Decode) -> Flow:
        """Copy a step's inputs to where the recorded kernels look for them."""
        mine = self._flow
        for kept, new in ((mine.x_TD, flow.x_TD), (mine.cos_Td, flow.cos_Td), (mine.sin_Td, flow.sin_Td)):
            kept.copy_(new)
        mine.slots_T.copy_(flow.slots_T)
        self._decode.position_S.copy_(decode.position_S)
        self._decode.block_table_SB[:, : decode.block_table_SB.shape[1]] = decode.block_table_SB
        mine.handle = None
        return mine

    def run(self, layer: int, attend: Callable[[Flow, Tensor | None], Asked], delta_TD: Tensor | None) -> Asked:
        """`attend` of a layer: recorded if it is the first time, then repeated."""
        if delta_TD is not None:
            self._delta_TD.copy_(delta_TD)
        if layer not in self._layers:
            with Tape() as tape:
                asked = attend(self._flow, None if delta_TD is None else self._delta_TD)
            self._layers[layer] = tape, asked
        tape, asked = self._layers[layer]
        tape.run()
        return asked


class Recorder:
    """The recordings of a model, the last used ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()

    def flow(self, flow: Flow, micro_batch: int) -> Flow:
        """`flow` itself, or where it can be recorded, one with the same content whose layers are.

        Micro-batches that are in flight together have recordings of their own.
        """
        decode, n_rows = flow.plan.decode, len(flow.x_TD)
        few = decode is not None and not flow.plan.prefills and n_rows <= FEW_ROWS
        if decode is None or not few or flow.logit_rows_R is not None or not is_fast(flow.x_TD):
            return flow
        n_blocks = max(_FEWEST_BLOCKS, 1 << (decode.block_table_SB.shape[1] - 1).bit_length())
        key = (micro_batch, n_rows, n_blocks, torch.get_num_threads())
        recorded = self._kept.pop(key, None) or Recorded(flow, decode, n_blocks)
        self._kept[key] = recorded
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return recorded.fill(flow, decode)
