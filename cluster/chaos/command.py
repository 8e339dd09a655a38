"""`expertmesh chaos`: faults in a running cluster, by name or on a schedule, and what its clients see of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from cluster.bench.common import console
from cluster.bench.gateway import DEFAULT_URL, AsJson, Key, Url
from cluster.chaos.schedule import draw
from cluster.control.faults import Fault, Kind
from cluster.errors import ExpertMeshError

if TYPE_CHECKING:
    from cluster.chaos.campaign import Faults

Member = Annotated[str, typer.Argument(help="a router, an expert worker or `controller`, as `status` names it")]
Seconds = Annotated[float, typer.Option(min=0, help="how long; 0: for good")]
Streams = Annotated[int, typer.Option(min=0, help="concurrent streams that are watched; 0: nobody looks")]
Tokens = Annotated[int, typer.Option(min=1, help="tokens of each stream")]
Times = Annotated[int, typer.Option(min=1, help="how often")]

app = typer.Typer(
    no_args_is_help=True,
    help="Let processes of a running cluster die, hang, become slow or lose each other, and see what clients see. "
    "Only in a cluster that was started with --allow-chaos.",
)

KINDS: tuple[Kind, ...] = ("kill", "pause", "slow", "partition")
ROLES = ("expert", "router", "controller")


@app.command()
def kill(
    member: Member,
    times: Times = 1,
    streams: Streams = 8,
    tokens: Tokens = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """End a process without a word (SIGKILL)."""
    _carry_out([Fault("kill", member)] * times, streams, tokens, url, key, as_json)


@app.command()
def pause(
    member: Member,
    seconds: Seconds = 2.0,
    times: Times = 1,
    streams: Streams = 8,
    tokens: Tokens = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Stop a process (SIGSTOP): it keeps its connections and says nothing. For good: until the controller ends it."""
    _carry_out([Fault("pause", member, seconds)] * times, streams, tokens, url, key, as_json)


@app.command()
def slow(
    member: Member,
    seconds: Seconds = 5.0,
    stopped: Annotated[float, typer.Option(min=0.01, max=0.99, help="part of the time for which it is stopped")] = 0.9,
    times: Times = 1,
    streams: Streams = 8,
    tokens: Tokens = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let a process compute for a part of the time only."""
    _carry_out([Fault("slow", member, seconds, stopped)] * times, streams, tokens, url, key, as_json)


@app.command()
def partition(
    router: Annotated[str, typer.Argument(help="a router, as `status` names it")],
    worker: Annotated[str, typer.Argument(help="the expert worker that it reaches no more")],
    seconds: Seconds = 5.0,
    times: Times = 1,
    streams: Streams = 8,
    tokens: Tokens = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let nothing through between a router and an expert worker, which everybody else reaches."""
    _carry_out([Fault("partition", router, seconds, peer=worker)] * times, streams, tokens, url, key, as_json)


@app.command()
def run(
    faults: Annotated[str, typer.Option(help=f"kinds, by commas: {', '.join(KINDS)}")] = "kill,pause,slow,partition",
    roles: Annotated[str, typer.Option(help=f"victims, by commas: {', '.join(ROLES)}")] = "expert,router",
    events: Annotated[int, typer.Option(min=1, help="how many faults")] = 20,
    seed: Annotated[int, typer.Option(help="of kinds, victims and moments")] = 0,
    streams: Annotated[int, typer.Option(min=1, help="concurrent streams that are watched")] = 16,
    tokens: Tokens = 64,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Random faults one after another, each after the fleet is whole again."""
    kinds = [kind for kind in KINDS if kind in _listed(faults, KINDS, "--faults")]
    victims = _listed(roles, ROLES, "--roles")
    rng = random.Random(seed)

    def drawn(fleet: dict[str, str]) -> Iterator[Fault]:
        for _ in range(events):
            yield draw(rng, kinds, victims, fleet)

    _measure(drawn, streams, tokens, url, key, as_json, seed)


def _listed(text: str, known: tuple[str, ...], option: str) -> list[str]:
    named = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in named if name not in known]:
        raise ExpertMeshError(f"{option}: {unknown[0]} is none of {', '.join(known)}")
    if not named:
        raise ExpertMeshError(f"{option} names none of {', '.join(known)}")
    return named


def _carry_out(faults: list[Fault], streams: int, tokens: int, url: str, key: str | None, as_json: bool) -> None:
    if streams:
        _measure(lambda fleet: iter(faults), streams, tokens, url, key, as_json, seed=0)
        return
    from cluster.chaos import campaign

    for fault in asyncio.run(campaign.inflict_alone(urlsplit(url).port, lambda fleet: iter(faults))):
        typer.echo(str(fault))


def _measure(faults: Faults, streams: int, tokens: int, url: str, key: str | None, as_json: bool, seed: int) -> None:
    from cluster.bench.chaos_stream import requests
    from cluster.bench.disturbed import conclude
    from cluster.chaos import campaign

    report = campaign.Report()

    async def measurement() -> None:
        with console.status("connecting") as status:

            def tell(what: str) -> None:
                status.update(f"{len(report.faults)} faults, {len(report.comparison.streams)} streams; {what}")

            await campaign.run(url, key, requests(streams, tokens), faults, random.Random(seed), report, tell)

    conclude(measurement(), report, as_json, show)


def show(result: dict[str, Any]) -> None:
    """A line for each fault, then the figures of each kind of fault."""
    from cluster.bench.disturbed import summary

    for each in result["faults"]:
        typer.echo(
            f"{each['fault']}: longest pause at once {each['at_once_s']:.2f} s, until all were ready "
            f"{each['pause_s']:.2f} s; first token after {each['first_token_s']:.2f} s"
        )
    for kind, pause in result["pause_s"].items():
        waits = {"at once": result["at_once_s"], "until all were ready": result["pause_s"]}
        waits["first token"] = result["first_token_s"]
        said = (f"{what} p50 {by[kind]['p50']:.2f} s, p99 {by[kind]['p99']:.2f} s" for what, by in waits.items())
        typer.echo(f"{pause['count']} x {kind}: pause {'; '.join(said)}; maximum {pause['max']:.2f} s")
    begin = f"interrupted ({result['interrupted']}): " if result["interrupted"] else ""
    typer.echo(f"{begin}{len(result['faults'])} faults: {summary(result)}")
