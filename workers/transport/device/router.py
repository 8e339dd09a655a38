"""The router's side of a step through device memory: `Experts` whose calls only launch, so that a step can be captured.

Legend: T token rows, K experts a token, P = T * K pairs, D hidden size, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.ops import Delta, Ops, Unsummed
from workers.transport.device.launch import STRIDE, Asked, Launch, Turn
from workers.transport.device.rows import StepRows


class Sent(NamedTuple):
    """A dispatch in flight."""

    layer: int
    place_TK: Tensor  # int32: where each choice's row will be in the rows that come back; -1: no worker has its expert
    weights_TK: Tensor


class Report(NamedTuple):
    """Of a step. Legend: N workers, by the numbers that the router gave them."""

    is_void: bool  # a worker did not answer in time: what the step gave is worth nothing
    pairs_LE: NDArray[np.int64]
    rows_N: NDArray[np.int64]  # that the worker took
    waited_ns_N: NDArray[np.int64]


class StepExperts:
    """Every layer of a step in order, none left out. Whoever launches, or replays, calls `begin_step` before.

    `owner_LE`, int32 on the device, is the number of the worker that computes each expert. It may be written to between
    two steps: a captured step follows. `report`, int64 on the device, is what `read` reads.
    """

    only_launches = True

    def __init__(self, rows: StepRows, owner_LE: Tensor, launch: Launch) -> None:
        device = rows.x_TD.device
        self.owner_LE = owner_LE
        n_workers = rows.layout.n_workers
        self.report = torch.zeros(1 + 2 * n_workers + owner_LE.numel(), dtype=torch.int64, device=device)
        self._status, both_2N = self.report[:1], self.report[1 : 1 + 2 * n_workers].view(2, n_workers)
        self._counts = Asked(self.report[1 + 2 * n_workers :].view(owner_LE.shape), *both_2N)
        self._step = torch.full((1,), -1, dtype=torch.int64, device=device)  # before the first, nobody is asked
        self._rows = rows
        self._launch = launch

    def begin_step(self, step: int) -> None:
        """Number the step that follows; numbers rise."""
        self.report.zero_()
        self._step.fill_(step * STRIDE)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Sent:
        """Let the workers have the rows; see `workers.model.experts.Experts`. An id below 0 is nobody's."""
        place_TK = self._launch.ask(self._rows, self._turn(layer), x_TD, expert_ids_TK, self.owner_LE, self._counts)
        return Sent(layer, place_TK, weights_TK)

    def combine(self, handle: Sent) -> Delta:
        """What the workers gave: on a GPU not added up yet, elsewhere y_TD, in the dtype of the rows."""
        self._launch.await_done(self._rows, self._turn(handle.layer), self._counts)
        rows_PD = self._rows.y_PD[: handle.place_TK.numel()]
        unsummed = Unsummed(rows_PD, handle.place_TK, handle.weights_TK)
        return unsummed if rows_PD.is_cuda else added_up(unsummed)

    def read(self) -> Report:
        """What the step was; waits for its end."""
        said: NDArray[np.int64] = self.report.cpu().numpy()
        n_workers = self._rows.layout.n_workers
        status, rows_N, waited_N, count_P = np.split(said, (1, 1 + n_workers, 1 + 2 * n_workers))
        return Report(bool(status[0]), count_P.reshape(self.owner_LE.shape), rows_N, waited_N)

    def by(self, ops: Ops) -> None:
        """Nothing: nobody else's operations capture what is computed elsewhere."""

    def micro_batches(self, n_rows: int) -> int:
        """One: both sides go through the layers together."""
        return 1

    def _turn(self, layer: int) -> Turn:
        return Turn(self._step, self._status, layer + 1)


def added_up(delta: Unsummed) -> Tensor:
    """y_TD: the weighted sum of each token's rows, added in expert order in float32."""
    rows_PD, place_TK, weights_TK = delta
    place_TK, order_TK = place_TK.sort(dim=1)
    weights_TK = weights_TK.gather(1, order_TK)
    y_TD = torch.zeros(len(place_TK), rows_PD.shape[1])
    for k in range(place_TK.shape[1]):
        row_TD = rows_PD.index_select(0, place_TK[:, k].clamp_min(0)).float() * weights_TK[:, k : k + 1]
        y_TD += torch.where(place_TK[:, k : k + 1] >= 0, row_TD, 0.0)  # a row that nobody wrote may be anything
    return y_TD.to(rows_PD.dtype)
