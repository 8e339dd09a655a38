"""Faults in a running cluster, and what its clients see of them.

Streams are run once undisturbed, then again and again while faults happen. Every stream has to end with the tokens of
its undisturbed run; the pause of a fault is the longest time that an open stream went without a token, from its begin
until all processes are ready again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cluster.bench.chaos import difference, run_all, whole
from cluster.bench.chaos_stream import Stream, compare
from cluster.bench.gateway import connect
from cluster.chaos.schedule import QUIET_S
from cluster.control.faults import Fault
from cluster.errors import ExpertMeshError
from cluster.fleet.operator_cli import ask
from cluster.fleet.status import processes

Tell = Callable[[str], None]
Faults = Callable[[dict[str, str]], Iterator[Fault]]  # from the role of every process, by id


@dataclass(slots=True)
class Report:
    """What is known so far; an interrupted run keeps it."""

    undisturbed: list[Stream] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)  # of all rounds, in the order of `undisturbed`
    errors: list[str] = field(default_factory=list)  # of streams that did not end
    faults: list[Fault] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)  # when each fault began, monotonic seconds
    over: list[float] = field(default_factory=list)  # when all processes were ready after it
    interrupted: str | None = None  # why

    def result(self) -> dict[str, Any]:
        """The figures."""
        pairs = [(i, seen, self.undisturbed[i % len(self.undisturbed)]) for i, seen in enumerate(self.streams)]
        ended = [(compare(seen, wanted), i, seen, wanted) for i, seen, wanted in pairs if seen.finish is not None]
        spans = zip_longest(self.begun, self.over, fillvalue=time.monotonic())
        waited = [longest_gap(self.streams, begin, end) for begin, end in spans]
        kinds = sorted({_group(fault) for fault in self.faults})
        return {
            "streams": len(ended),
            "changed": sum(verdict == "changed" for verdict, *_ in ended),
            "near_ties": sum(verdict == "near-tie" for verdict, *_ in ended),
            "errors": self.errors,
            "faults": [{"fault": str(f), "pause_s": pause} for f, pause in zip(self.faults, waited, strict=True)],
            "pause_s": {
                kind: figures([p for f, p in zip(self.faults, waited, strict=True) if _group(f) == kind])
                for kind in kinds
            },
            "undisturbed_pause_s": max((seen.longest_pause for seen in self.undisturbed), default=None),
            "interrupted": self.interrupted,
            "differences": [difference(i, seen, wanted) for verdict, i, seen, wanted in ended if verdict != "same"],
        }


def longest_gap(streams: list[Stream], begin: float, end: float) -> float:
    """Seconds that an open stream went without a token, of those gaps that reach into the time from begin to end."""
    gaps = (pair for stream in streams for pair in pairwise(stream.arrivals))
    return max((after - before for before, after in gaps if before <= end and after >= begin), default=0.0)


def figures(waited: list[float]) -> dict[str, float]:
    """Count, median, 99th percentile and maximum of pauses."""
    p50, p99, most = np.percentile(waited, (50, 99, 100))
    return {"count": len(waited), "p50": float(p50), "p99": float(p99), "max": float(most)}


def _group(fault: Fault) -> str:
    role = "partition" if fault.kind == "partition" else f"{fault.kind} {fault.member.partition('-')[0]}"
    if fault.kind in ("pause", "slow"):
        return f"{role} {f'{fault.seconds:g} s' if fault.seconds else 'for good'}" if fault.kind == "pause" else role
    return role


async def run(
    url: str,
    key: str | None,
    todo: list[dict[str, Any]],
    faults: Faults,
    rng: random.Random,
    report: Report,
    tell: Tell,
) -> None:
    """All of `faults`, one after another, each a random while after the fleet is whole again, under the requests
    `todo`; `tell` hears what happens."""
    client = await connect(url, key)
    tell("undisturbed")
    if errors := await run_all(client, todo, report.undisturbed):
        raise ExpertMeshError(f"undisturbed, {len(errors)} of {len(todo)} streams failed: {errors[0]}")
    inflicting = asyncio.create_task(_inflict_all(urlsplit(url).port, faults, report, tell, rng))
    try:
        while not inflicting.done():
            errors = await run_all(client, todo, report.streams)
            report.errors += errors
            if len(errors) == len(todo):
                raise ExpertMeshError(f"every stream of a round failed: {errors[0]}")
        await inflicting
    finally:
        inflicting.cancel()


async def inflict_alone(port: int | None, faults: Faults) -> list[Fault]:
    """The same without streams: nobody looks at what clients see."""
    done = []
    for fault in faults({each["id"]: each["role"] for each in await asyncio.to_thread(processes, port)}):
        await _inflict(port, fault)
        done.append(fault)
    return done


async def _inflict_all(port: int | None, faults: Faults, report: Report, tell: Tell, rng: random.Random) -> None:
    dead: set[int] = set()
    fleet = await whole(port, dead)
    for fault in faults({each["id"]: each["role"] for each in fleet}):
        await asyncio.sleep(rng.uniform(*QUIET_S))
        pids = {each["id"]: each["pid"] for each in await whole(port, dead)}
        if fault.kind == "kill" or (fault.kind == "pause" and not fault.seconds):
            dead.add(pids[fault.member])
        tell(str(fault))
        await _inflict(port, fault)
        report.faults.append(fault)
        report.begun.append(time.monotonic())
        await asyncio.sleep(fault.seconds)
        await whole(port, dead)
        report.over.append(time.monotonic())


async def _inflict(port: int | None, fault: Fault) -> None:
    body = {"kind": fault.kind, "member": fault.member, "seconds": fault.seconds, "stopped": fault.stopped}
    await asyncio.to_thread(ask, "POST", "/chaos", port, body | {"peer": fault.peer})
