"""What every transport offers a router: rows out to expert workers, rows back.

Shape legend: T token rows of one part, P (token, expert) pairs of one part, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from workers.wire import Tag

__all__ = ["Rows", "Tag", "Transport"]


class Rows(NamedTuple):
    """One worker's part of a dispatch. A token row is there once, even if several of its experts live on the worker."""

    tag: Tag
    x_TD: Tensor  # token rows, the model's compute dtype
    token_P: Tensor  # int32, host memory: which row of x_TD each pair takes
    expert_P: Tensor  # int32, host memory: which expert computes it; ascending


class Transport(Protocol):
    """A router's way to its expert workers. Not thread-safe: the step loop owns it.

    Several requests to one worker may be in flight. It answers in the order they were sent, and replies are received
    in that order: whoever asks for a later one drops those before it.
    """

    dropped_replies: int  # replies that nobody awaited any more

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`; reopen it if it broke or the address changed. Returns before it is usable."""

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""

    def send(self, worker: str, rows: Rows) -> None:
        """Hand over `rows` and return at once. Raises WorkerLost when the stream is known to be broken."""

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> int:
        """Write the reply to the rows sent with `tag` into `out_PD`: unweighted, in the order of the pairs.

        out_PD is contiguous and has the dtype and device of the rows. Returns the nanoseconds the worker computed.
        Raises WorkerLost when the stream breaks, nothing came within `timeout_s`, or the worker refused the rows.
        """

    def close(self) -> None:
        """Close every stream."""
