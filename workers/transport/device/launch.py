"""The exchange's kernels on a GPU, as each side calls them. Nothing but launches: a step can be captured."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from workers.transport.device.rows import StepRows

STRIDE = 4096  # more than layers


class Turn(NamedTuple):
    """Which layer of which step it is. The tensors are on the device of the side."""

    step: Tensor  # int64 [1]: the number of the step times `STRIDE`; below 0 the side takes no part
    status: Tensor  # int64 [1]: above 0 when the step is void
    layer: int  # from 1


class Asked(NamedTuple):
    """What is counted of a router's step; on its device, int64, added to."""

    count_LE: Tensor  # the pairs of each expert
    rows_N: Tensor  # the rows that each worker is to take
    waited_N: Tensor  # the nanoseconds that each worker was waited for


class Taken(NamedTuple):
    """What is counted of a worker's step; on its device, int64 [1], added to."""

    pairs: Tensor
    waited: Tensor  # the nanoseconds that routers were waited for


class Launch(Protocol):
    """What both sides do with the memory that they share, in the order of one stream."""

    def ask(self, rows: StepRows, turn: Turn, x_TD: Tensor, ids_TK: Tensor, owner_LE: Tensor, counts: Asked) -> Tensor:
        """The router's rows and choices, and that they are there. int32 [T, K]: where each choice's row will be.

        owner_LE: int32, the worker of each expert, of all layers.
        """

    def await_done(self, rows: StepRows, turn: Turn, counts: Asked) -> None:
        """Until every worker has given its rows; the status becomes 1 when one has not in time."""

    def take(self, rows: StepRows, turn: Turn, worker: int, x_TD: Tensor, ids_TK: Tensor, counts: Taken) -> None:
        """Until the router has asked; then its rows and, of its choices, the experts of `worker`, -1 elsewhere."""

    def give(self, rows: StepRows, turn: Turn, worker: int, y_PD: Tensor, place_P: Tensor, ids_P: Tensor) -> None:
        """The rows of the pairs that have a place, and the word that they are there; not if one that `ids_P` names has
        none, which makes the step void."""


class CudaLaunch:
    """`Launch` by Triton kernels."""

    def __init__(self, limit_s: float) -> None:
        """limit_s: how long a kernel polls for the other side."""
        from workers.transport.device import compiled  # Triton is there where a GPU is

        self._kernels = compiled
        self._limit_ns = int(limit_s * 1e9)

    def ask(self, rows: StepRows, turn: Turn, x_TD: Tensor, ids_TK: Tensor, owner_LE: Tensor, counts: Asked) -> Tensor:
        (n_rows, top_k), d, layer = ids_TK.shape, rows.layout.hidden_size, turn.layer - 1
        place_TK = ids_TK.new_empty(ids_TK.shape, dtype=owner_LE.dtype)
        self._kernels.ask_kernel[(rows.layout.n_rows,)](
            x_TD, ids_TK, owner_LE[layer], rows.x_TD, rows.word_P, place_TK, counts.count_LE[layer], counts.rows_N,
            n_rows, D=d, BD=_block(d), K=top_k, K2=_power(top_k), num_warps=4,
        )  # fmt: skip
        self._kernels.signal_kernel[(1,)](rows.asked, *turn, num_warps=1)
        return place_TK

    def await_done(self, rows: StepRows, turn: Turn, counts: Asked) -> None:
        n_workers, stride = rows.done.shape
        self._kernels.wait_kernel[(n_workers,)](
            rows.done, *turn, counts.waited_N, self._limit_ns, STRIDE=stride, num_warps=1
        )

    def take(self, rows: StepRows, turn: Turn, worker: int, x_TD: Tensor, ids_TK: Tensor, counts: Taken) -> None:
        n_rows, top_k = ids_TK.shape
        d = rows.layout.hidden_size
        self._kernels.wait_kernel[(1,)](rows.asked, *turn, counts.waited, self._limit_ns, STRIDE=1, num_warps=1)
        self._kernels.take_kernel[(n_rows,)](
            rows.x_TD, rows.word_P, turn.step, turn.status, counts.pairs, x_TD, ids_TK, worker, D=d, BD=_block(d),
            K=top_k, K2=_power(top_k), num_warps=4,
        )  # fmt: skip

    def give(self, rows: StepRows, turn: Turn, worker: int, y_PD: Tensor, place_P: Tensor, ids_P: Tensor) -> None:
        d = rows.layout.hidden_size
        self._kernels.give_kernel[(len(place_P),)](
            y_PD, place_P, ids_P, turn.status, rows.y_PD, D=d, BD=_block(d), num_warps=4
        )
        self._kernels.signal_kernel[(1,)](rows.done[worker], *turn, num_warps=1)


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _block(hidden_size: int) -> int:
    return min(_power(hidden_size), 2048)
