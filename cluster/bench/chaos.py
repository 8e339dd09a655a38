"""`expertmesh bench chaos`: kill processes of a running cluster under streams, and see whether any client notices.

Processes of one role are killed (SIGKILL) at random moments, each once the fleet is whole again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from cluster.bench.chaos_stream import pauses, requests
from cluster.bench.common import console
from cluster.bench.disturbed import Comparison, compare_during, conclude, summary, whole
from cluster.bench.gateway import DEFAULT_URL, AsJson, Key, Url, connect
from cluster.errors import ExpertMeshError

Role = Literal["expert", "router", "controller"]

_QUIET_S = (0.5, 8.0)  # between two kills, once the fleet is whole again


@dataclass(slots=True)
class Report:
    """What is known so far; an interrupted run keeps it."""

    role: Role
    planned: int  # kills
    comparison: Comparison = field(default_factory=Comparison)
    kills: list[float] = field(default_factory=list)  # moments, monotonic seconds

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to report yet."""
        return bool(self.comparison.streams)

    def result(self) -> dict[str, Any]:
        """The figures."""
        return {
            "role": self.role,
            "planned_kills": self.planned,
            "kills": len(self.kills),
            "pause_s": figures(pauses(self.comparison.streams, self.kills)),
            **self.comparison.result(),
        }


def figures(each: list[float]) -> dict[str, Any] | None:
    return {"median": statistics.median(each), "max": max(each), "each": each} if each else None


async def kill_often(port: int | None, report: Report, rng: random.Random) -> None:
    """Kill as many processes as planned, each a random while after the fleet was whole again."""
    dead: set[int] = set()
    while len(report.kills) < report.planned:
        await asyncio.sleep(rng.uniform(*_QUIET_S))
        candidates = [process["pid"] for process in await whole(port, dead) if process["role"] == report.role]
        if not candidates:
            raise ExpertMeshError(f"this cluster has no process of role {report.role}")
        victim = rng.choice(candidates)
        os.kill(victim, signal.SIGKILL)
        dead.add(victim)
        report.kills.append(time.monotonic())


async def campaign(url: str, key: str | None, n_streams: int, tokens: int, seed: int, report: Report) -> None:
    """The whole measurement against the gateway at `url`."""
    seen = report.comparison
    client = await connect(url, key)
    with console.status("connecting") as status:

        def tell(what: str) -> None:
            status.update(f"{len(report.kills)} of {report.planned} kills, {len(seen.streams)} streams; {what}")

        rng = random.Random(seed)
        todo = requests(n_streams, tokens)
        await compare_during(client, todo, lambda: kill_often(urlsplit(url).port, report, rng), seen, tell)


def chaos(
    role: Annotated[Role, typer.Option(help="what to kill")] = "expert",
    kills: Annotated[int, typer.Option(min=1, help="how many processes to kill")] = 20,
    streams: Annotated[int, typer.Option(min=1, help="concurrent streams")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each stream")] = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    seed: Annotated[int, typer.Option(help="of the moments and the victims")] = 0,
    as_json: AsJson = False,
) -> None:
    """Kill processes of a running cluster under load and compare every stream with its undisturbed run."""
    report = Report(role, kills)
    conclude(campaign(url, key, streams, tokens, seed, report), report, as_json, lambda result: show(result, streams))


def show(result: dict[str, Any], n_streams: int) -> None:
    """One line with all figures."""
    pause = result["pause_s"]
    longest = "none measured" if pause is None else f"median {pause['median']:.2f} s, maximum {pause['max']:.2f} s"
    begin = f"interrupted ({result['interrupted']}) after " if result["interrupted"] else ""
    typer.echo(
        f"{begin}{result['kills']} of {result['planned_kills']} x kill -9 of one {result['role']} under {n_streams} "
        f"streams: longest pause {longest}; {summary(result)}"
    )
