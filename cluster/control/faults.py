"""Faults that a process inflicts on itself when it is told to, in a cluster that allows it: for `expertmesh chaos`."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "pause", "slow", "partition"]

_FIRST_S = 0.05  # so that whoever asked is answered
_TURN_S = 0.1  # of a process that is slowed down: it is stopped for a part of each


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one process."""

    kind: Kind
    member: str
    seconds: float = 0.0  # how long; 0: for good. Of no meaning for `kill`.
    stopped: float = 0.9  # of `slow`: the part of the time for which it is stopped
    peer: str = ""  # of `partition`: the expert worker that router `member` does not reach any more

    def __str__(self) -> str:
        how_long = "" if self.kind == "kill" else f" for {self.seconds:g} s" if self.seconds else " for good"
        return f"{self.kind} {self.member}{f' from {self.peer}' if self.peer else ''}{how_long}"


def inflict(fault: Fault, pid: int) -> None:
    """Begin a `kill`, `pause` or `slow` of process `pid`, by signals from another process: a process that is stopped
    could not let itself go on. Raises OSError."""
    subprocess.Popen(
        ["/bin/sh", "-c", _script(fault, pid)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _script(fault: Fault, pid: int) -> str:
    if fault.kind == "kill":
        what = f"kill -KILL {pid}"
    elif fault.kind == "pause":
        what = f"kill -STOP {pid}" + (f"; sleep {fault.seconds:g}; kill -CONT {pid}" if fault.seconds else "")
    else:
        stopped, runs = fault.stopped * _TURN_S, (1 - fault.stopped) * _TURN_S
        turn = f"kill -STOP {pid} || exit; sleep {stopped:.3f}; kill -CONT {pid}; sleep {runs:.3f}"
        turns = f"for turn in $(seq {max(1, round(fault.seconds / _TURN_S))})" if fault.seconds else "while true"
        what = f"{turns}; do {turn}; done"
    return f"sleep {_FIRST_S}; {what}"
