"""`expertmesh bench moves`: random moves, replications, drops and scalings of a running cluster under streams.

What is refused, since it cannot be, is drawn again. At the end everything has to be as the final placement says.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from cluster.bench.chaos_stream import requests
from cluster.bench.common import console
from cluster.bench.disturbed import Comparison, compare_during, conclude, figures, longest_gaps, summary, whole
from cluster.bench.gateway import DEFAULT_URL, AsJson, Key, Url, connect
from cluster.errors import ExpertMeshError, PlacementError
from cluster.fleet.operator_cli import ask
from cluster.fleet.status import processes

_VERBS = ("move", "replicate", "drop", "scale")
_WEIGHTS = (4, 4, 4, 1)
_AROUND = 1  # so many processes fewer or more than there were
_LOOK_S = 0.1
_SETTLED_WITHIN_S = 30.0


@dataclass(slots=True)
class Report:
    """What is known so far; an interrupted run keeps it."""

    planned: int
    comparison: Comparison = field(default_factory=Comparison)
    done: Counter[str] = field(default_factory=Counter)  # by verb
    refused: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)  # of each that was done, monotonic seconds
    oldest_epoch_s: float = 0.0  # how long a router worked with an epoch after there was a newer one, at most
    left_over: list[str] = field(default_factory=list)  # what is not as the final placement says

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to report yet."""
        return bool(self.done)

    def result(self) -> dict[str, Any]:
        """The figures. Whatever is left over counts as an error."""
        seen = self.comparison.result()
        pauses = [longest_gaps(self.comparison.streams, begin, end)[0] for begin, end in self.spans]
        return {
            "planned": self.planned,
            "done": dict(self.done),
            "refused": self.refused,
            "seconds": figures([end - begin for begin, end in self.spans]),
            "pause_s": figures(pauses),
            "oldest_epoch_s": self.oldest_epoch_s,
            **seen,
            "errors": [*seen["errors"], *self.left_over],
        }


class Moves:
    """Random verbs against the admin API of the cluster on `port`."""

    def __init__(self, port: int | None, rng: random.Random, report: Report) -> None:
        self._port = port
        self._rng = rng
        self._report = report
        self._first: Counter[str] = Counter()  # processes by role, when it began

    async def run(self) -> None:
        """As many as planned, then a look at what is left."""
        self._first = Counter(process["role"] for process in await whole(self._port, set()))
        if not self._first["expert"]:
            raise ExpertMeshError("this cluster has no expert workers between which experts could move")
        watching = asyncio.create_task(self._watch())
        try:
            while self._report.done.total() < self._report.planned:
                await self._one()
                if watching.done():
                    watching.result()  # it ends only by an error, and then nobody looks any more
        finally:
            watching.cancel()
        await self._settle()

    async def _one(self) -> None:
        verb, began = self._rng.choices(_VERBS, _WEIGHTS)[0], time.monotonic()
        try:
            await (self._scale() if verb == "scale" else self._edit(verb))
        except PlacementError:
            self._report.refused += 1
        else:
            self._report.done[verb] += 1
            self._report.spans.append((began, time.monotonic()))

    async def _scale(self) -> None:
        kind, role = self._rng.choice((("expert_workers", "expert"), ("routers", "router")))
        least = max(1, self._first[role] - _AROUND)
        await self._ask("POST", "/scale", {kind: self._rng.randint(least, self._first[role] + _AROUND)})

    async def _edit(self, verb: str) -> None:
        shown = await self._ask("GET", "/placement")
        homes_LE, workers = shown["homes"], [worker["id"] for worker in shown["workers"]]
        layer = self._rng.choice([layer for layer, experts in enumerate(homes_LE) if experts])
        expert = self._rng.randrange(len(homes_LE[layer]))
        source, target = self._rng.choice(sorted(homes_LE[layer][expert])), self._rng.choice(workers)
        body: dict[str, Any] = {"layer": layer, "expert": expert}
        if verb == "move":
            body |= {"source": source, "target": target}
        else:
            body["worker"] = target if verb == "replicate" else source
        await self._ask("POST", f"/placement/{verb}", body)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return await asyncio.to_thread(ask, method, path, self._port, body)

    async def _watch(self) -> None:
        """How long any router works with an epoch that is not the newest one of which anybody has heard."""
        seen: list[tuple[int, float]] = []  # epochs that were the newest one, and since when
        while True:
            fleet = await asyncio.to_thread(processes, self._port)
            now, epochs = time.monotonic(), [each["epoch"] for each in fleet if each["state"] == "ready"]
            newest = max(epochs, default=0)
            if not seen or newest > seen[-1][0]:
                seen.append((newest, now))
            used = [each["epoch"] for each in fleet if each["role"] == "router" and each["state"] == "ready"]
            for epoch in used:
                replaced = next((since for known, since in seen if known > epoch), now)
                self._report.oldest_epoch_s = max(self._report.oldest_epoch_s, now - replaced)
            seen = [each for each in seen if each[0] >= min(used, default=newest)]
            await asyncio.sleep(_LOOK_S)

    async def _settle(self) -> None:
        """Whatever the final placement does not name has to go: experts, their memory, processes."""
        deadline = time.monotonic() + _SETTLED_WITHIN_S
        while True:
            shown = await self._ask("GET", "/placement")
            wanted = {worker["id"]: worker["replicas"] for worker in shown["workers"]}
            fleet = await asyncio.to_thread(processes, self._port)
            held = {each["id"]: each["detail"] for each in fleet if each["role"] == "expert"}
            self._report.left_over = [
                f"{worker} holds {held.get(worker, {}).get('experts')} experts instead of {n}"
                for worker, n in wanted.items()
                if held.get(worker, {}).get("experts") != n
            ]
            self._report.left_over += [f"{worker} is still there" for worker in sorted(held.keys() - wanted.keys())]
            each_bytes = {detail["weight_bytes"] / n for worker, detail in held.items() if (n := wanted.get(worker))}
            if not self._report.left_over and len(each_bytes) > 1:
                self._report.left_over.append("workers hold more memory than their experts take")
            if not self._report.left_over or time.monotonic() > deadline:
                return
            await asyncio.sleep(_LOOK_S)


def moves(
    events: Annotated[int, typer.Option(min=1, help="how many changes")] = 200,
    streams: Annotated[int, typer.Option(min=1, help="concurrent streams")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each stream")] = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    seed: Annotated[int, typer.Option(help="of the changes")] = 0,
    as_json: AsJson = False,
) -> None:
    """Move, replicate and drop random experts and scale a running cluster under load; compare every stream with its
    undisturbed run."""
    report = Report(events)
    conclude(_measure(url, key, requests(streams, tokens), seed, report), report, as_json, show)


async def _measure(url: str, key: str | None, todo: list[dict[str, Any]], seed: int, report: Report) -> None:
    client = await connect(url, key)
    verbs = Moves(urlsplit(url).port, random.Random(seed), report)
    with console.status("connecting") as status:

        def tell(what: str) -> None:
            n = len(report.comparison.streams)
            status.update(f"{report.done.total()} of {report.planned} changes, {n} streams; {what}")

        await compare_during(client, todo, verbs.run, report.comparison, tell)


def show(result: dict[str, Any]) -> None:
    """Two lines with all figures."""
    done = ", ".join(f"{n} x {verb}" for verb, n in sorted(result["done"].items()))
    seconds, pause = result["seconds"], result["pause_s"]
    typer.echo(
        f"{done}, {result['refused']} refused: p50 {seconds['p50']:.2f} s, p99 {seconds['p99']:.2f} s; longest pause "
        f"p50 {pause['p50']:.2f} s, p99 {pause['p99']:.2f} s; no epoch in use {result['oldest_epoch_s']:.2f} s after "
        "the next"
    )
    begin = f"interrupted ({result['interrupted']}): " if result["interrupted"] else ""
    typer.echo(begin + summary(result))
