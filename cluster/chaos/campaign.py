"""Faults in a running cluster, and what its clients see of them.

The pause of a fault is the longest time that an open stream went without a further token, from the begin of the fault
until all processes are ready again. Beside it stand the longest one that began at once, which the fault itself made
(later ones come of what starting a process takes from the cores), and what new streams waited for their first token.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from urllib.parse import urlsplit

from cluster.bench.disturbed import Comparison, Tell, compare_during, figures, longest_gaps, whole
from cluster.bench.gateway import connect
from cluster.chaos.schedule import QUIET_S
from cluster.control.faults import Fault
from cluster.fleet.operator_cli import ask
from cluster.fleet.status import processes

_AT_ONCE_S = 1.0

Faults = Callable[[dict[str, str]], Iterator[Fault]]  # from the role of every process, by id


@dataclass(slots=True)
class Report:
    """What is known so far; an interrupted run keeps it."""

    comparison: Comparison = field(default_factory=Comparison)
    faults: list[Fault] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)  # when each fault began, monotonic seconds
    over: list[float] = field(default_factory=list)  # when all processes were ready after it

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to report yet."""
        return bool(self.comparison.streams and self.faults)

    def result(self) -> dict[str, Any]:
        """The figures."""
        spans = list(zip_longest(self.begun, self.over, fillvalue=time.monotonic()))
        each = [{"fault": str(fault), **self._waits(*span)} for fault, span in zip(self.faults, spans, strict=True)]
        kinds = sorted({_group(fault) for fault in self.faults})

        def by_kind(wait: str) -> dict[str, dict[str, float]]:
            seen = list(zip(self.faults, each, strict=True))
            return {kind: figures([waits[wait] for fault, waits in seen if _group(fault) == kind]) for kind in kinds}

        return {
            "faults": each,
            **{wait: by_kind(wait) for wait in ("pause_s", "at_once_s", "first_token_s")},
            **self.comparison.result(),
        }

    def _waits(self, begin: float, end: float) -> dict[str, Any]:
        streams = self.comparison.streams
        pause_s, first_token_s = longest_gaps(streams, begin, end)
        at_once_s, _ = longest_gaps(streams, begin, min(end, begin + _AT_ONCE_S))
        return {"pause_s": pause_s, "at_once_s": at_once_s, "first_token_s": first_token_s}


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
    port = urlsplit(url).port
    await compare_during(client, todo, lambda: _inflict_all(port, faults, report, tell, rng), report.comparison, tell)


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
