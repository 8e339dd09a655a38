"""What every transport offers a router: rows out to expert workers, rows back.

Shape legend: T token rows of one part, P (token, expert) pairs of one part, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Tag(NamedTuple):
    """Which dispatch a message belongs to. A reply whose tag is not the awaited one is dropped and counted."""

    router: int  # number of the router, drawn anew at every router start, so that a restarted router is another one
    epoch: int  # placement epoch the rows were routed under
    step: int  # the router's step counter
    layer: int
    part: int  # micro-batch within the step
    attempt: int  # 0, then 1 more for every repair of this part


@dataclass(frozen=True, slots=True)
class Rows:
    """One worker's part of a dispatch. A token row is there once, even if several of its experts live on the worker."""

    tag: Tag
    x_TD: Tensor  # token rows, the model's compute dtype
    token_P: Tensor  # int32: which row of x_TD each pair takes
    expert_P: Tensor  # int32: which expert computes it; ascending, so that the pairs of one expert are contiguous


class Transport(Protocol):
    """A router's way to its expert workers. Not thread-safe: the step loop owns it.

    Requests to one worker are answered in the order they were sent; several may be in flight.
    """

    def connect(self, worker: str, address: str) -> None:
        """Open (or reopen, if the address changed) the way to `worker`. Returns before it is usable."""

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows` and return at once. Raises WorkerLost when the stream is known to be broken."""

    def receive(self, worker: str, tag: Tag, timeout_s: float) -> Tensor:
        """The reply y_PD to the rows sent with `tag`, unweighted, in the order of the pairs.

        Raises WorkerLost when the stream breaks or nothing came within `timeout_s`.
        """

    def close(self) -> None:
        """Close every stream."""
