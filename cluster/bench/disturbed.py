"""Streams that run while something is done to the cluster, each compared with its undisturbed run.

The streams are run once undisturbed, then again and again. Every one has to end with the tokens of its undisturbed run.
A position at which the two likeliest tokens of that run are within `NEAR_TIE` of each other may differ: there the order
of float32 additions decides.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import typer

from cluster.bench.chaos_stream import Stream, compare, first_difference, follow
from cluster.bench.common import print_json
from cluster.bench.gateway import Client
from cluster.errors import ExpertMeshError
from cluster.fleet.status import processes

_WHOLE_WITHIN_S = 120.0
_POLL_S = 0.2

Tell = Callable[[str], None]


@dataclass(slots=True)
class Comparison:
    """What is known so far of the streams; an interrupted run keeps it."""

    undisturbed: list[Stream] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)  # of all rounds, in the order of `undisturbed`
    errors: list[str] = field(default_factory=list)  # of streams that did not end
    interrupted: str | None = None  # why

    def result(self) -> dict[str, Any]:
        """The figures. Streams that had not ended when it was interrupted count for pauses alone."""
        pairs = [(i, seen, self.undisturbed[i % len(self.undisturbed)]) for i, seen in enumerate(self.streams)]
        ended = [(compare(seen, wanted), i, seen, wanted) for i, seen, wanted in pairs if seen.finish is not None]
        return {
            "streams": len(ended),
            "changed": sum(verdict == "changed" for verdict, *_ in ended),
            "near_ties": sum(verdict == "near-tie" for verdict, *_ in ended),
            "errors": self.errors,
            "undisturbed_pause_s": max((seen.longest_pause for seen in self.undisturbed), default=None),
            "undisturbed_first_token_s": max((seen.first_token_s for seen in self.undisturbed), default=None),
            "interrupted": self.interrupted,
            "differences": [_difference(i, seen, wanted) for verdict, i, seen, wanted in ended if verdict != "same"],
        }


class Report(Protocol):
    """A `Comparison`, and what was done meanwhile."""

    comparison: Comparison

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to report yet."""

    def result(self) -> dict[str, Any]:
        """The figures, those of the comparison among them."""


def longest_gaps(streams: list[Stream], begin: float, end: float) -> tuple[float, float]:
    """Seconds that an open stream went without a further token, and that one went without its first: the longest that
    reach into the time from `begin` to `end`."""
    further = (pair for stream in streams for pair in pairwise(stream.waits[1:]))
    first = (tuple(stream.waits[:2]) for stream in streams if len(stream.waits) > 1)
    longest = [
        max((after - before for before, after in gaps if before <= end and after >= begin), default=0.0)
        for gaps in (further, first)
    ]
    return longest[0], longest[1]


def figures(seconds: list[float]) -> dict[str, float]:
    """Count, median, 99th percentile and maximum."""
    p50, p99, most = np.percentile(seconds, (50, 99, 100))
    return {"count": len(seconds), "p50": float(p50), "p99": float(p99), "max": float(most)}


def _difference(index: int, seen: Stream, wanted: Stream) -> dict[str, Any]:
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


async def compare_during(
    client: Client,
    todo: list[dict[str, Any]],
    disturb: Callable[[], Coroutine[Any, Any, None]],
    seen: Comparison,
    tell: Tell,
) -> None:
    """Run the requests `todo` once, and then over and over until `disturb` has ended. Raises ExpertMeshError when all
    of a round failed, or one before anything was done."""
    tell("undisturbed")
    if errors := await _run_all(client, todo, seen.undisturbed):
        raise ExpertMeshError(f"undisturbed, {len(errors)} of {len(todo)} streams failed: {errors[0]}")
    disturbing = asyncio.create_task(disturb())
    try:
        while not disturbing.done():
            errors = await _run_all(client, todo, seen.streams)
            seen.errors += errors
            if len(errors) == len(todo):
                raise ExpertMeshError(f"every stream of a round failed: {errors[0]}")
        await disturbing
    finally:
        disturbing.cancel()


async def _run_all(client: Client, todo: list[dict[str, Any]], into: list[Stream]) -> list[str]:
    """All requests at once; what each saw goes into `into` as it comes. The errors of those that did not end."""
    streams = [Stream() for _ in todo]
    into += streams
    ends = await asyncio.gather(*map(follow, [client] * len(todo), todo, streams), return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, (ExpertMeshError, OSError, EOFError)):
            raise end
    return [str(end) or type(end).__name__ for end in ends if isinstance(end, BaseException)]


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


def conclude(
    measurement: Coroutine[Any, Any, None], report: Report, as_json: bool, show: Callable[[dict[str, Any]], None]
) -> None:
    """Run `measurement` to its end, Ctrl-C or SIGTERM, and print what `report` has by then.

    Raises typer.Exit(1) when a stream failed or changed, or it was interrupted; what it raised before there was
    anything to report.
    """
    seen = report.comparison
    try:
        asyncio.run(_until_terminated(measurement))
    except (KeyboardInterrupt, asyncio.CancelledError) as signalled:
        seen.interrupted = "Ctrl-C" if isinstance(signalled, KeyboardInterrupt) else "SIGTERM"
    except ExpertMeshError as error:
        if not report.is_begun:
            raise
        seen.interrupted = str(error)
    result = report.result()
    if as_json:
        print_json(result)
    else:
        _show_wrong(result)
        show(result)
    if result["changed"] or result["errors"] or result["interrupted"]:
        raise typer.Exit(1)


async def _until_terminated(measurement: Coroutine[Any, Any, None]) -> None:
    myself = asyncio.current_task()
    assert myself is not None
    with suppress(RuntimeError, ValueError):  # not in the main thread
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, myself.cancel)
    await measurement


def _show_wrong(result: dict[str, Any]) -> None:
    """A line for each stream that went wrong."""
    for each in result["differences"]:
        where = f"at token {each['position']}: {each['seen']} instead of {each['wanted']}, margin {each['margin']}"
        typer.echo(f"stream {each['stream']} differs {where}")
    for error in result["errors"]:
        typer.echo(f"a stream failed: {error}")


def summary(result: dict[str, Any]) -> str:
    """What became of the streams, as the end of a line."""
    said = (
        f"{result['changed']} of {result['streams']} streams changed, {result['near_ties']} differ from a near-tie "
        f"on, {len(result['errors'])} failed"
    )
    if result["undisturbed_pause_s"] is None:
        return said
    pause_s, first_s = result["undisturbed_pause_s"], result["undisturbed_first_token_s"]
    return f"{said} (undisturbed: longest pause {pause_s:.2f} s, first token after {first_s:.2f} s at most)"
