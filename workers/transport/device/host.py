"""The same exchange in host memory: the protocol as processes without a GPU run it, kills and all.

Memory that both sides write, and `Launch` by torch and loops. What a GPU does in the order of its stream happens
at once, and a side blocks where its kernels would poll.
"""

from __future__ import annotations

import mmap
import os
import time

import torch
from torch import Tensor

from workers.errors import DeviceError
from workers.transport.device.launch import STRIDE, Asked, Taken, Turn
from workers.transport.device.rows import StepRows

_NAME = "expertmesh-rows"
_SPIN_S = 0.0001


class OwnHostMemory:
    """Zeroed memory of this process; whoever opens it may write to it too."""

    def __init__(self, n_bytes: int) -> None:
        self._file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.ftruncate(self._file, n_bytes)
        self.bytes = torch.frombuffer(mmap.mmap(self._file, n_bytes), dtype=torch.uint8)
        #: What a peer needs to map it.
        self.name = f"{os.getpid()} {self._file}"

    def close(self) -> None:
        """Nobody opens it any more. It lives as long as something lies in it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class PeerHostMemory:
    """Memory of another process of this host."""

    def __init__(self, name: str, n_bytes: int) -> None:
        """`name` as the owner says it. Raises DeviceError when it is not there."""
        try:
            pid, number = map(int, name.split())
            path = f"/proc/{pid}/fd/{number}"
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                raise DeviceError(f"{path} is no memory for rows")
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self.bytes: Tensor = torch.frombuffer(mmap.mmap(file, n_bytes), dtype=torch.uint8)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise DeviceError(f"its memory cannot be opened from here: {error}") from None

    def close(self) -> None:
        """Nothing to do: it lives as long as something lies in it."""


class HostLaunch:
    """`Launch` by torch, at once; its methods are described there."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def ask(self, rows: StepRows, turn: Turn, x_TD: Tensor, ids_TK: Tensor, owner_LE: Tensor, counts: Asked) -> Tensor:
        (n_rows, top_k), layer = ids_TK.shape, turn.layer - 1
        owner_E, count_E = owner_LE[layer], counts.count_LE[layer]
        ids_TK = ids_TK.to(torch.int32)
        order_TK = ids_TK.argsort(dim=1, stable=True)
        sorted_TK = ids_TK.gather(1, order_TK)
        owner_TK = torch.where(sorted_TK >= 0, owner_E[sorted_TK.clamp_min(0).long()], -1)
        word_TK = torch.where(owner_TK >= 0, owner_TK << 16 | sorted_TK, -1)
        at_TK = torch.arange(n_rows * top_k, dtype=torch.int32).view(n_rows, top_k)
        place_TK = torch.empty_like(at_TK).scatter_(1, order_TK, torch.where(owner_TK >= 0, at_TK, -1))
        count_E += sorted_TK[owner_TK >= 0].bincount(minlength=len(count_E))
        for worker in range(len(counts.rows_N)):
            counts.rows_N[worker] += (owner_TK == worker).any(1).sum()
        rows.x_TD[:n_rows] = x_TD
        rows.word_P.fill_(-1)
        rows.word_P[: n_rows * top_k] = word_TK.flatten()
        _signal(rows.asked[0], turn)
        return place_TK

    def await_done(self, rows: StepRows, turn: Turn, counts: Asked) -> None:
        for flag, waited in zip(rows.done[:, 0], counts.waited_N, strict=True):
            self._wait(flag, turn, waited)

    def take(self, rows: StepRows, turn: Turn, worker: int, x_TD: Tensor, ids_TK: Tensor, counts: Taken) -> None:
        self._wait(rows.asked[0], turn, counts.waited)
        word_TK = rows.word_P[: ids_TK.numel()].view(ids_TK.shape)
        is_on = int(turn.step) >= 0 and int(turn.status) == 0
        ids_TK.copy_(torch.where((word_TK >> 16 == worker) & (word_TK >= 0) & is_on, word_TK & 0xFFFF, -1))
        counts.pairs.add_((ids_TK >= 0).sum())
        x_TD.copy_(rows.x_TD[: len(x_TD)])

    def give(self, rows: StepRows, turn: Turn, worker: int, y_PD: Tensor, place_P: Tensor, ids_P: Tensor) -> None:
        here_P = place_P >= 0
        if bool((ids_P[~here_P] >= 0).any()):
            turn.status.fill_(1)
        rows.y_PD[: len(place_P)][here_P] = y_PD[place_P[here_P].long()]
        _signal(rows.done[worker, 0], turn)

    def _wait(self, flag: Tensor, turn: Turn, waited: Tensor) -> None:
        if int(turn.step) < 0:
            return
        wanted = int(turn.step) + turn.layer
        began = time.monotonic()
        end = began + (self._limit_s if int(turn.status) == 0 else 0)
        while int(flag) < wanted and time.monotonic() < end:
            time.sleep(_SPIN_S)
        waited += int(1e9 * (time.monotonic() - began))
        if int(flag) < wanted:
            turn.status.fill_(1)


def _signal(flag: Tensor, turn: Turn) -> None:
    assert turn.layer < STRIDE
    if int(turn.step) >= 0 and int(turn.status) == 0:
        flag.fill_(int(turn.step) + turn.layer)
