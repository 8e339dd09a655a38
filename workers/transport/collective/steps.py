"""The router's side of captured steps over a group: whole decoding steps in lockstep with all workers.

Nothing between a step's word and its end depends on what the gate chose, nor visits the host. Legend: that of
`step_rows`, and L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.ops import Delta, Ops, Unsummed
from workers.transport.base import StepReport, Tag
from workers.transport.collective.blocks import view
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.joiner import BUILD_S
from workers.transport.collective.mesh import Broken, Mesh
from workers.transport.collective.ranks import Lane
from workers.transport.collective.step_group import StepGroup
from workers.transport.collective.step_rows import WORD_BYTES, Ask, StepWord, places
from workers.transport.device.router import added_up

_LEAST_CAPACITY = 16


class Sent(NamedTuple):
    """A dispatch in flight."""

    place_P: Tensor  # int64: where each pair's row will be in what comes back; -1: nowhere
    weights_TK: Tensor  # in expert order


class _Room(NamedTuple):
    """The memory of steps of one size: a captured step works on it."""

    ask: Ask
    back_RD: Tensor  # R = N * C


class CollectiveExperts:
    """`Experts` over a `StepGroup`: every layer of a step in order, none left out.

    `owner_LE`, int64 on the device, is the worker of each expert, by its place in the group. It may be written to
    between steps: a captured step follows. `report`, int64 [1 + L * E] on the device: pairs that found no room at their
    worker, whose step is to be thrown away; then the pairs of each expert.
    """

    only_launches = True

    def __init__(
        self, group: StepGroup, n_layers: int, n_experts: int, hidden_size: int, dtype: torch.dtype, is_fused: bool
    ) -> None:
        """is_fused: whether the model's operations take rows that are not added up."""
        device = group.device
        self.owner_LE = torch.full((n_layers, n_experts), -1, dtype=torch.int64, device=device)
        self.report = torch.zeros(1 + n_layers * n_experts, dtype=torch.int64, device=device)
        self.failed: str | None = None  # why the rest of the step is not exchanged
        self._count_LE = self.report[1:].view(n_layers, n_experts)
        self._worker_N = torch.arange(group.n_workers, device=device)
        self._group, self._hidden_size, self._dtype, self._is_fused = group, hidden_size, dtype, is_fused
        self._rooms: dict[tuple[int, int, int], _Room] = {}
        self._room: _Room | None = None
        self._capacity = 0

    def open(self, word: StepWord) -> None:
        """Before a step of this size, or its replay."""
        self.report.zero_()
        self.failed, self._capacity = None, word.capacity
        if word.size not in self._rooms:
            n_rows, top_k, capacity = word.size
            width, dtype, device = self._hidden_size, self._dtype, self._group.device
            back_RD = torch.zeros(self._group.n_workers * capacity, width, dtype=dtype, device=device)
            self._rooms[word.size] = _Room(Ask(n_rows, top_k, width, dtype, device), back_RD)
        self._room = self._rooms[word.size]

    def begin_step(self, step: int) -> None:
        """Nothing: `CollectiveSteps` numbers them."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Sent:
        """Let the workers have the rows; see `workers.model.experts.Experts`. An id below 0 is nobody's."""
        assert self._room is not None
        ask = self._room.ask
        ids_TK, order_TK = expert_ids_TK.long().sort(dim=1)
        expert_P = ids_TK.flatten()
        is_real_P, asked_P = expert_P >= 0, expert_P.clamp_min(0)
        owner_P = torch.where(is_real_P, self.owner_LE[layer].index_select(0, asked_P), -1)
        place_P = places((owner_P[:, None] == self._worker_N).long())
        has_room_P = place_P < self._capacity
        self.report[0] += (~has_room_P).sum()
        self._count_LE[layer].index_add_(0, asked_P, is_real_P.long())
        ask.x_TD.copy_(x_TD)
        ask.word_P.copy_(torch.where(owner_P >= 0, owner_P << 16 | expert_P, -1))
        self._exchange(self._group.to_workers, ask.block)
        place_P = torch.where((place_P >= 0) & has_room_P, owner_P * self._capacity + place_P, -1)
        return Sent(place_P, weights_TK.gather(1, order_TK))

    def combine(self, handle: Sent) -> Delta:
        """What the workers gave: on a GPU not added up yet, elsewhere y_TD, in the dtype of the rows."""
        assert self._room is not None
        self._exchange(self._group.to_router, self._room.back_RD)
        place_P, weights_TK = handle
        # Into expert order, in which they are added up.
        rows_PD = self._room.back_RD.index_select(0, place_P.clamp_min(0))
        in_order_P = torch.where(place_P >= 0, torch.arange(len(place_P), device=place_P.device), -1)
        unsummed = Unsummed(rows_PD, in_order_P.to(torch.int32).view(weights_TK.shape), weights_TK)
        return unsummed if self._is_fused else added_up(unsummed)

    def by(self, ops: Ops) -> None:
        """Nothing: nobody else's operations capture what is computed elsewhere."""

    def micro_batches(self, n_rows: int) -> int:
        """One: all ranks go through the layers together."""
        return 1

    def _exchange(self, exchange: Callable[[Tensor], None], block: Tensor) -> None:
        """A step that has failed is not exchanged any further: it is void."""
        if self.failed is None:
            try:
                exchange(block)
            except RuntimeError as error:
                self.failed = str(error)


class CollectiveSteps:
    """A way for whole steps over the group that a router is in. The step loop's alone.

    A step goes this way when nothing else is in flight. It is void when a worker is lost or hangs, which ends the
    group; when it holds an expert no more; or when more pairs than there is room for want one worker, of which there
    is twice as much from then on.
    """

    name = "collective"

    def __init__(
        self,
        transport: CollectiveTransport,
        n_layers: int,
        n_experts: int,
        top_k: int,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        limit_s: float,
        size_of: Callable[[int], int] = int,
        is_fused: bool = True,
    ) -> None:
        """limit_s: how long a step may take. size_of: the rows of the captured step that holds so many."""
        self._transport, self._top_k, self._limit_s, self._size_of = transport, top_k, limit_s, size_of
        self._shape = (n_layers, n_experts, hidden_size, dtype, is_fused)
        self._mesh: Mesh | None = None
        self._experts: CollectiveExperts | None = None
        self._owners: NDArray[np.int32] | None = None
        self._number = 0
        self._capacity: dict[int, int] = {}  # of each size
        self._known: set[tuple[int, int, int]] = set()  # sizes that all ranks have computed in this group
        self._word = StepWord(0, 0, 0, 0)
        self._due: list[tuple[Any, Tensor, Any]] = []  # of each worker: its word's work and block, and ours to it

    @property
    def experts(self) -> CollectiveExperts | None:
        """Of the group in use; None: there was none yet."""
        return self._experts

    @property
    def key(self) -> Hashable:
        """The group, and the room at its workers: a captured step has the memory of both."""
        return None if self._mesh is None else (self._mesh.group.number, self._word.capacity)

    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool:
        """Whether a step can go this way now. owner_LE: which of `workers` computes each expert, by its place there.

        Puts the owners in force for the steps that follow.
        """
        mesh = self._transport.rests()
        if mesh is None or mesh.rank not in mesh.steps or not set(workers) <= set(mesh.group.workers):
            return False
        if mesh is not self._mesh:
            self._mesh, self._owners = mesh, None
            self._known.clear()
            self._experts = CollectiveExperts(mesh.steps[mesh.rank], *self._shape)
        assert self._experts is not None
        places = np.array([mesh.group.workers.index(worker) for worker in workers])
        owners: NDArray[np.int32] = places[owner_LE]
        if self._owners is None or not np.array_equal(owners, self._owners):
            self._experts.owner_LE.copy_(torch.from_numpy(owners))
            self._owners = owners
        return True

    def begin_step(self, n_rows: int, tag: Tag, limit_s: float) -> bool:
        """Tell the workers that a step of `n_rows` rows follows; it has the limit that all steps here have."""
        mesh, experts, size = self._mesh, self._experts, self._size_of(n_rows)
        assert mesh is not None and experts is not None
        if not self._transport.begin(mesh):
            return False
        self._number += 1
        capacity = self._capacity.setdefault(size, _capacity(size * self._top_k, len(mesh.workers)))
        self._word = word = StepWord(self._number, size, self._top_k, capacity)
        experts.open(word)
        said = torch.frombuffer(word.pack(), dtype=torch.uint8)
        self._due = []
        try:
            for worker in mesh.workers:
                block = torch.empty(WORD_BYTES, dtype=torch.uint8)
                self._due.append((mesh.receive(worker, Lane.REPLY, block), block, None))
            for at, worker in enumerate(mesh.workers):
                self._due[at] = (*self._due[at][:2], mesh.send(worker, Lane.REQUEST, said))
        except Broken as broken:
            self._end(mesh, broken)
            return False
        return True

    def end_step(self) -> StepReport | None:
        """Wait for the end of the step; None when it is void."""
        mesh, experts, word = self._mesh, self._experts, self._word
        assert mesh is not None and experts is not None
        # The first of a size is computed kernel by kernel, and captured.
        end = time.monotonic() + (self._limit_s if word.size in self._known else BUILD_S)
        try:
            if experts.failed is not None:
                raise Broken(experts.failed)
            mesh.wait_for_stream(end - time.monotonic())
            words = [self._hear(mesh, rank, due, end) for rank, due in zip(mesh.workers, self._due, strict=True)]
        except Broken as broken:
            self._end(mesh, broken)
            return None
        self._end(mesh)
        self._known.add(word.size)
        report = experts.report.cpu().numpy()
        if report[0]:
            self._capacity[word.n_rows] = min(2 * word.capacity, word.n_rows * word.top_k)
        if report[0] or any(each.is_void for each in words):
            return None
        return StepReport(report[1:].reshape(experts.owner_LE.shape))

    def _end(self, mesh: Mesh, broken: Broken | None = None) -> None:
        self._due = []
        if broken is not None:
            mesh.fail(str(broken))
        self._transport.end(mesh)

    def _hear(self, mesh: Mesh, rank: int, due: tuple[Any, Tensor, Any], end: float) -> StepWord:
        coming, block, sent = due
        try:
            mesh.wait(sent, end - time.monotonic())
            mesh.wait(coming, end - time.monotonic())
        except Broken as broken:
            raise Broken(f"{mesh.name(rank)}: {broken}") from None
        said = StepWord.parse(view(block))
        if said is None or said[:4] != self._word[:4]:
            raise Broken(f"{mesh.name(rank)} answers another step")
        return said


def _capacity(n_pairs: int, n_workers: int) -> int:
    """Room for twice a worker's even share of the pairs."""
    share = max(_LEAST_CAPACITY, -(-2 * n_pairs // n_workers))
    return min(n_pairs, 1 << (share - 1).bit_length())
