"""`expertmesh bench chaos`: kill processes of a running cluster under streams, and see whether any client notices.

The streams are run once undisturbed; then again and again while processes of one role are killed (SIGKILL) at random
moments. Every stream has to end with the tokens of its undisturbed run. A position at which the two likeliest tokens
of the undisturbed run are within `NEAR_TIE` of each other may differ: there the order of float32 additions decides.
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

from cluster.bench.chaos_stream import Stream, compare, first_difference, follow, pauses, requests
from cluster.bench.common import console, print_json
from cluster.bench.gateway import DEFAULT_URL, AsJson, Client, Key, Url, connect
from cluster.errors import ExpertMeshError
from cluster.fleet.status import processes

Role = Literal["expert", "router", "controller"]

_QUIET_S = (0.5, 8.0)  # between two kills, once the fleet is whole again
_WHOLE_WITHIN_S = 120.0
_POLL_S = 0.2


@dataclass(slots=True)
class Report:
    """What is known so far; an interrupted run keeps it."""

    role: Role
    planned: int  # kills
    undisturbed: list[Stream] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)  # of all rounds, in the order of `undisturbed`
    errors: list[str] = field(default_factory=list)  # of streams that did not end
    kills: list[float] = field(default_factory=list)  # moments, monotonic seconds
    interrupted: str | None = None  # why

    def result(self) -> dict[str, Any]:
        """The figures. Streams that had not ended when it was interrupted count for the pauses alone."""
        pairs = [(i, seen, self.undisturbed[i % len(self.undisturbed)]) for i, seen in enumerate(self.streams)]
        ended = [(i, seen, wanted) for i, seen, wanted in pairs if seen.finish is not None]
        verdicts = [(compare(seen, wanted), i, seen, wanted) for i, seen, wanted in ended]
        return {
            "role": self.role,
            "planned_kills": self.planned,
            "kills": len(self.kills),
            "streams": len(ended),
            "changed": sum(verdict == "changed" for verdict, *_ in verdicts),
            "near_ties": sum(verdict == "near-tie" for verdict, *_ in verdicts),
            "errors": self.errors,
            "pause_s": figures(pauses(self.streams, self.kills)),
            "undisturbed_pause_s": max((seen.longest_pause for seen in self.undisturbed), default=None),
            "interrupted": self.interrupted,
            "differences": [difference(i, seen, wanted) for verdict, i, seen, wanted in verdicts if verdict != "same"],
        }


def figures(each: list[float]) -> dict[str, Any] | None:
    return {"median": statistics.median(each), "max": max(each), "each": each} if each else None


def difference(index: int, seen: Stream, wanted: Stream) -> dict[str, Any]:
    """Where a stream went another way."""
    position = first_difference(seen, wanted)
    at = slice(0, 0) if position is None else slice(position, position + 1)
    return {
        "stream": index,
        "position": position,
        "wanted": wanted.tokens[at],
        "seen": seen.tokens[at],
        "margin": wanted.margins[at],
        "finish": [wanted.finish, seen.finish],
    }


async def run_all(client: Client, todo: list[dict[str, Any]], into: list[Stream]) -> list[str]:
    """All requests at once; what each saw goes into `into` as it comes. The errors of those that did not end."""
    streams = [Stream() for _ in todo]
    into += streams
    ends = await asyncio.gather(*map(follow, [client] * len(todo), todo, streams), return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, (ExpertMeshError, OSError, EOFError)):
            raise end
    return [str(end) or type(end).__name__ for end in ends if isinstance(end, BaseException)]


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


async def whole(port: int | None, dead: set[int]) -> list[dict[str, Any]]:
    """The processes of the fleet, once all are ready and none is among the `dead`."""
    deadline = time.monotonic() + _WHOLE_WITHIN_S
    while True:
        fleet = await asyncio.to_thread(processes, port)
        missing = [process["id"] for process in fleet if process["state"] != "ready" or process["pid"] in dead]
        if not missing:
            return fleet
        if time.monotonic() > deadline:
            raise ExpertMeshError(f"{', '.join(missing)} not ready within {_WHOLE_WITHIN_S:g} s")
        await asyncio.sleep(_POLL_S)


async def campaign(url: str, key: str | None, n_streams: int, tokens: int, seed: int, report: Report) -> None:
    """The whole measurement against the gateway at `url`."""
    myself = asyncio.current_task()
    assert myself is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, myself.cancel)
    client = await connect(url, key)
    todo = requests(n_streams, tokens)
    with console.status("undisturbed") as status:
        if errors := await run_all(client, todo, report.undisturbed):
            raise ExpertMeshError(f"undisturbed, {len(errors)} of {n_streams} streams failed: {errors[0]}")
        killing = asyncio.create_task(kill_often(urlsplit(url).port, report, random.Random(seed)))
        while not killing.done():
            status.update(f"{len(report.kills)} of {report.planned} kills, {len(report.streams)} streams")
            errors = await run_all(client, todo, report.streams)
            report.errors += errors
            if len(errors) == n_streams:
                raise ExpertMeshError(f"every stream of a round failed: {errors[0]}")
        await killing


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
    try:
        asyncio.run(campaign(url, key, streams, tokens, seed, report))
    except (KeyboardInterrupt, asyncio.CancelledError) as signalled:
        report.interrupted = "Ctrl-C" if isinstance(signalled, KeyboardInterrupt) else "SIGTERM"
    except ExpertMeshError as error:
        if not report.streams:
            raise
        report.interrupted = str(error)
    result = report.result()
    if as_json:
        print_json(result)
    else:
        show(result, streams)
    if result["changed"] or result["errors"] or result["interrupted"]:
        raise typer.Exit(1)


def show(result: dict[str, Any], n_streams: int) -> None:
    """A line for each stream that went wrong, and a last one with all figures."""
    for each in result["differences"]:
        where = f"at token {each['position']}: {each['seen']} instead of {each['wanted']}, margin {each['margin']}"
        typer.echo(f"stream {each['stream']} differs {where}")
    for error in result["errors"]:
        typer.echo(f"a stream failed: {error}")
    pause = result["pause_s"]
    longest = "none measured" if pause is None else f"median {pause['median']:.2f} s, maximum {pause['max']:.2f} s"
    quiet = result["undisturbed_pause_s"]
    begin = f"interrupted ({result['interrupted']}) after " if result["interrupted"] else ""
    typer.echo(
        f"{begin}{result['kills']} of {result['planned_kills']} x kill -9 of one {result['role']} under {n_streams} "
        f"streams: {result['changed']} of {result['streams']} streams changed, {result['near_ties']} differ from a "
        f"near-tie on, {len(result['errors'])} failed; longest pause {longest}"
        + ("" if quiet is None else f" (undisturbed {quiet:.2f} s)")
    )
