"""The router's end of the exchange through device memory: what it shares with whom, and when a step can go that way."""

from __future__ import annotations

import json
import secrets
import threading

import numpy as np
import torch
from numpy.typing import NDArray

from workers.transport.base import FastWay, Offered, Pair, StepReport, StepTraffic, Tag
from workers.transport.device import memory
from workers.transport.device.agreement import PAGE_BYTES, RouterSide, Words
from workers.transport.device.offer import MAX_WORKERS, Offer, Shape
from workers.transport.device.router import StepExperts
from workers.transport.device.rows import StepRows
from workers.transport.shm.memory import NotShared, OwnMemory, PeerMemory

STEP_LIMIT_S = 1.0  # how long either end of a step waits for the other before the step is void
_ABSENT = (1 << 63) - 1  # the flag of a worker that does not exist: nobody waits for it


class DeviceWay:
    """A router's rows in its device's memory, and the workers that have mapped them. One for each router.

    Handshakes come from other threads; everything else belongs to the step loop, which for each step asks whether it is
    `ready`, begins it, computes with `experts`, and says how it ended.
    """

    name = key = "device"  # what is captured is of use as long as the way is there

    def __init__(self, shape: Shape, device: torch.device, limit_s: float, other: FastWay) -> None:
        """limit_s: how long a step waits for a worker before it is void. other: for the rows of other steps, which is
        offered together with this one. Raises DeviceError, NotShared."""
        self.shape = shape
        self._other = other
        self._device = device
        self._number = secrets.randbits(62) | 1
        self._page = OwnMemory(PAGE_BYTES)
        self._memory = memory.own(shape.layout.n_bytes, device)
        self._rows = StepRows(self._memory.bytes, shape.layout)
        self._rows.done.fill_(_ABSENT)
        self._side = RouterSide(self._number, words(self._page))
        self._limit_s = limit_s
        self._numbers: dict[str, int] = {}  # of workers, once and for all
        self._joined: dict[str, PeerMemory] = {}
        self._workers: tuple[str, ...] = ()
        self._owners: NDArray[np.int32] | None = None
        self._place_P = np.empty(0, np.int32)  # of each expert: its worker, by its place in `_workers`
        self._was_void = False
        self._lock = threading.Lock()
        owner_LE = torch.full((shape.n_layers, shape.n_experts), -1, dtype=torch.int32, device=device)
        self.experts = StepExperts(self._rows, owner_LE, memory.launch(device, limit_s))

    def offer(self, worker: str) -> Offering | None:
        """What to say to `worker`; None when there is no number left for it, or no other way to it."""
        other = self._other.offer(worker)
        if other is None:
            return None
        with self._lock:
            self._joined.pop(worker, None)  # its stream is new, and so may be its process
            number = self._numbers.setdefault(worker, len(self._numbers))
        if number >= MAX_WORKERS:
            other.close()
            return None
        said = Offer(self._number, number, self._device.type, self._page.name, self._memory.name, self.shape)
        return Offering(self, worker, said.text(), other)

    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool:
        """Whether a step can go this way now. owner_LE: which of `workers` computes each expert, by its place there.

        Puts the owners in force for the steps that follow.
        """
        with self._lock:
            pages = [self._joined.get(worker) for worker in workers]
        for page in pages:
            if page is None or not self._side.is_ready(words(page), rests=self._was_void):
                return False
        numbers = np.array([self._numbers[worker] for worker in workers], np.int32)
        owners: NDArray[np.int32] = numbers[owner_LE]
        if workers != self._workers or self._owners is None or not np.array_equal(owners, self._owners):
            self._put_owners(owners, numbers.tolist())
            self._place_P = owner_LE.ravel()
            self._workers = workers
            self._side.conducts(int(numbers[0]))
        return True

    def begin_step(self, n_rows: int, tag: Tag, limit_s: float) -> bool:
        """Agree on a step with up to `n_rows` rows; False when the workers do not answer in time. It has a number of
        its own, and the limit that its kernels were made with."""
        conductor = self._joined.get(self._workers[0])
        step = None if conductor is None else self._side.ask(n_rows, words(conductor), self._limit_s)
        if step is None:
            return False
        self.experts.begin_step(step.number)
        return True

    def end_step(self) -> StepReport | None:
        """Wait for the end of the step; None when it is void, because a worker did not answer in time. Then none begins
        before its workers rest."""
        report = self.experts.read()
        self._was_void = report.is_void
        if report.is_void:
            return None
        numbers = [self._numbers[worker] for worker in self._workers]
        pairs_N = np.bincount(self._place_P, report.pairs_LE.ravel(), len(numbers)).astype(np.int64)
        traffic = zip(report.rows_N[numbers], pairs_N, report.waited_ns_N[numbers], strict=True)
        return StepReport(report.pairs_LE, tuple(self._traffic(*map(int, each)) for each in traffic))

    def _traffic(self, n_rows: int, n_pairs: int, waited_ns: int) -> StepTraffic:
        """What a worker computes it counts itself: nothing of it comes back with the rows."""
        row_bytes = self.shape.layout.row_bytes
        return StepTraffic(n_rows * row_bytes, n_pairs * row_bytes, waited_ns / 1e9, 0.0)

    def joined(self, worker: str, page: PeerMemory) -> None:
        """`worker` has mapped the rows; its page."""
        with self._lock:
            self._joined[worker] = page

    @property
    def members(self) -> tuple[str, ...]:
        """The workers that have mapped the rows."""
        with self._lock:
            return tuple(self._joined)

    def close(self) -> None:
        """No step follows."""
        self._page.forget_file()
        self._memory.close()

    def _put_owners(self, owners: NDArray[np.int32], numbers: list[int]) -> None:
        # Into the same memory: a captured step reads it.
        self.experts.owner_LE.copy_(torch.from_numpy(owners))
        waited_for = torch.tensor([number in numbers for number in range(MAX_WORKERS)])
        self._rows.done[:, 0] = torch.where(waited_for, 0, _ABSENT).to(self._device)
        self._owners = owners


class Offering:
    """An offer on its way: of the rows of captured steps, and of a way for all other rows."""

    def __init__(self, way: DeviceWay, worker: str, text: str, other: Offered) -> None:
        self.text = json.dumps({"steps": text, "other": other.text})
        self._way, self._worker, self._other = way, worker, other

    def accepted(self, text: str) -> Pair:
        """The worker took both. Raises OSError when they cannot be used after all."""
        said = json.loads(text)
        pair = self._other.accepted(said["other"])
        try:
            self._way.joined(self._worker, PeerMemory(said["steps"], PAGE_BYTES))
        except NotShared:
            pair.close()
            raise
        return pair

    def close(self) -> None:
        """The worker declined, or the stream broke first."""
        self._other.close()


def words(page: OwnMemory | PeerMemory) -> Words:
    """A page as its words."""
    return np.frombuffer(page.map, np.int64)
