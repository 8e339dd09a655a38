"""`expertmesh placement`, `rebalance` and `drain`: the admin API of the running cluster from the command line."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import ExpertMeshError, PlacementError

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 10.0

Port = Annotated[int | None, typer.Option(help="of the gateway, when several clusters run")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Replica = Annotated[str, typer.Argument(metavar="L:E@W", help="layer, expert and worker")]
Where = Annotated[str, typer.Argument(metavar="L:E", help="layer and expert, both from 0")]

placement = typer.Typer(no_args_is_help=True, help="See and change which expert worker holds which expert.")


@placement.command()
def show(port: Port = None, as_json: Json = False) -> None:
    """Workers with their room and load, and the homes of every expert with several."""
    answer = ask("GET", "/placement", port)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    change = f"; under way: {answer['change']}" if answer["change"] else ""
    typer.echo(f"epoch {answer['epoch']}, imbalance {answer['imbalance']:.3f} (max / mean rows, 60 s window){change}")
    for worker in answer["workers"]:
        state = "drained" if worker["drained"] else worker["state"]
        room = (
            f"{worker['replicas']} of {worker['slots']} slots" if worker["slots"] else f"{worker['replicas']} replicas"
        )
        typer.echo(f"  {worker['id']:12} {state:9} {room:18} {worker['recent_rows']:12.0f} rows recently")
    for layer, experts in enumerate(answer["homes"]):
        for expert, homes in enumerate(experts):
            if len(homes) > 1:
                shown = ", ".join(f"{worker} {share:.0%}" for worker, share in sorted(homes.items()))
                typer.echo(f"  {layer}:{expert} on {shown}")
    for pin in answer["pins"]:
        typer.echo(f"  {pin} is pinned")


@placement.command()
def plan(
    trace: Annotated[
        Path | None,
        typer.Option(help="plan for the loads of this routing trace, a file or a directory, not for the recent ones"),
    ] = None,
    port: Port = None,
    as_json: Json = False,
) -> None:
    """What `rebalance` would do; with --json a file that `placement apply` takes."""
    if trace is None:
        answer = ask("GET", "/placement/plan", port)
    else:
        from cluster.routing.trace import read_trace

        loads_LE = read_trace(trace).total().chosen_LE
        answer = ask("POST", "/placement/plan", port, {"loads": loads_LE.tolist()})
    typer.echo(json.dumps(answer) if as_json else _forecast(answer["forecast"]))


@placement.command()
def apply(
    file: Annotated[Path, typer.Argument(help="JSON as `placement plan --json` prints it")], port: Port = None
) -> None:
    """Bring a whole placement into force: a plan, unless the placement has changed since, or one that `placement show
    --json` printed."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        body = {"homes": content["homes"], "made_for_epoch": content.get("made_for_epoch")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlacementError(f"{file} is not what `expertmesh placement plan --json` prints: {error!r}") from error
    _report(ask("PUT", "/placement", port, body))


@placement.command()
def move(
    where: Where,
    to: Annotated[str, typer.Option(help="worker that is to hold it")],
    source: Annotated[str | None, typer.Option("--from", help="worker that gives it up; needed with replicas")] = None,
    port: Port = None,
) -> None:
    """Load an expert on another worker, then unload it where it was."""
    layer, expert = _where(where)
    body = {"layer": layer, "expert": expert, "source": source, "target": to}
    _report(ask("POST", "/placement/move", port, body))


@placement.command()
def replicate(
    where: Where,
    to: Annotated[str | None, typer.Option(help="worker; default: the one with most room")] = None,
    port: Port = None,
) -> None:
    """Give an expert another replica."""
    layer, expert = _where(where)
    _report(ask("POST", "/placement/replicate", port, {"layer": layer, "expert": expert, "worker": to}))


@placement.command()
def drop(where: Replica, port: Port = None) -> None:
    """Take one replica of an expert away; never the last one."""
    _report(ask("POST", "/placement/drop", port, _replica(where)))


@placement.command()
def pin(where: Replica, port: Port = None) -> None:
    """Keep a replica where it is, whatever is planned; where there is none it is loaded."""
    _report(ask("POST", "/placement/pin", port, _replica(where)))


@placement.command()
def unpin(where: Replica, port: Port = None) -> None:
    """Let plans move a pinned replica again."""
    _report(ask("POST", "/placement/unpin", port, _replica(where)))


@placement.command()
def receipts(port: Port = None) -> None:
    """The latest actions as JSON: forecast, cost, error, and the imbalance since."""
    typer.echo(json.dumps(ask("GET", "/receipts", port), indent=2))


def rebalance(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False, port: Port = None
) -> None:
    """Place experts by the load of the last minutes: more replicas for busy ones, shares so that workers are even."""
    answer = ask("POST", "/rebalance", port, {"dry_run": dry_run})
    typer.echo(_forecast(answer["forecast"]))
    if not dry_run:
        _report(answer)


def scale(
    expert_workers: Annotated[int | None, typer.Option(min=1, help="expert workers there are to be")] = None,
    routers: Annotated[int | None, typer.Option(min=1, help="routers there are to be")] = None,
    gateways: Annotated[int | None, typer.Option(min=1, help="gateways there are to be")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="for new ones to be ready")] = 300.0,
    port: Port = None,
) -> None:
    """More or fewer processes while requests run; when it cannot be, there are as many as before."""
    sizes = {"expert_workers": expert_workers, "routers": routers, "gateways": gateways}
    if not any(sizes.values()):
        raise PlacementError("say how many of what: --expert-workers, --routers, --gateways")
    _report(ask("POST", "/scale", port, sizes | {"timeout_s": timeout_s}))


def drain(
    worker: Annotated[str, typer.Argument(help="id of an expert worker")],
    undo: Annotated[bool, typer.Option("--undo", help="let the next rebalance use it again")] = False,
    port: Port = None,
) -> None:
    """Move everything away from an expert worker, so that it can be ended."""
    if not re.fullmatch(r"[\w.-]+", worker):  # it becomes part of a path
        raise PlacementError(f"there is no expert worker {worker!r}; `expertmesh status` names them")
    if undo:
        ask("POST", f"/workers/{worker}/undrain", port)
        typer.echo(f"{worker} may be used again")
    else:
        _report(ask("POST", f"/workers/{worker}/drain", port))


def _where(text: str) -> tuple[int, int]:
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) is None:
        raise PlacementError(f"{text} is not LAYER:EXPERT, as in 3:5")
    return int(found[1]), int(found[2])


def _replica(text: str) -> dict[str, Any]:
    pair, _, worker = text.partition("@")
    layer, expert = _where(pair)
    if not worker:
        raise PlacementError(f"{text} names no worker; write it as {text}@expert-0")
    return {"layer": layer, "expert": expert, "worker": worker}


def _forecast(forecast: dict[str, Any]) -> str:
    return (
        f"imbalance {forecast['imbalance_before']:.3f} -> {forecast['imbalance_after']:.3f}, "
        f"{forecast['moved_replicas']} replicas to load ({forecast['moved_bytes'] / 2**20:.0f} MiB), "
        f"experts' time {-100 * forecast['gain']:+.1f}%"
    )


def _report(receipt: dict[str, Any]) -> None:
    typer.echo(
        f"{receipt['action']}: epoch {receipt['epoch_before']} -> {receipt['epoch_after']}, "
        f"{receipt['added']} replicas loaded, {receipt['removed']} unloaded, {receipt['seconds']:.2f} s"
    )


def ask(method: str, path: str, port: int | None, body: dict[str, Any] | None = None) -> Any:
    """The answer of the running cluster's admin API. Raises PlacementError with its reason for a refusal."""
    import httpx

    url, token = _admin(port)
    headers = {"Authorization": f"Bearer {token}"}
    # A change takes as long as the weights take to load.
    patience = httpx.Timeout(None, connect=_CONNECT_S)
    try:
        response = httpx.request(method, f"{url}{path}", json=body, headers=headers, timeout=patience, trust_env=False)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        raise ExpertMeshError(f"the controller at {url} does not answer: {error}") from error
    except httpx.HTTPError as error:
        raise ExpertMeshError(
            f"the controller at {url} was lost: {error}; it comes back by itself. What it had published is in force, "
            "and a scaling goes on: look at `expertmesh placement show`, and ask again for what is missing"
        ) from error
    except (httpx.InvalidURL, ValueError) as error:  # a token with a line break; NaN in a file
        raise ExpertMeshError(f"{url}{path} cannot be asked: {error}") from error
    except KeyboardInterrupt:
        if method != "GET":
            typer.echo("it goes on in the cluster; `expertmesh placement receipts` says how it ends", err=True)
        raise
    return _answer(response)


def _answer(response: httpx.Response) -> Any:
    try:
        content = response.json()
    except ValueError as error:
        raise ExpertMeshError(f"{response.url} is no admin API: it answered {response.status_code}") from error
    if response.is_success:
        return content
    reason = content.get("detail") if isinstance(content, dict) else None
    if response.status_code == 409:
        raise PlacementError(str(reason))
    raise ExpertMeshError(f"the controller answered {response.status_code}: {reason or response.text[:200]}")


def _admin(port: int | None) -> tuple[str, str]:
    """Where the admin API is, and its token: as the environment says, else those of the cluster of this user here."""
    from cluster.fleet.run_state import admin_token, find, read_token
    from cluster.fleet.snapshot import read

    if url := os.environ.get("EXPERTMESH_ADMIN_URL"):
        if not (file := os.environ.get("EXPERTMESH_ADMIN_TOKEN_FILE")):
            raise ExpertMeshError("EXPERTMESH_ADMIN_URL is set, but EXPERTMESH_ADMIN_TOKEN_FILE is not")
        return url.rstrip("/"), read_token(Path(file))
    state = find(port)
    # However old: the address stays, also where a full disk keeps the snapshot from being renewed.
    there = read(port, max_age_s=math.inf)["processes"]
    controllers = [process for process in there if process["role"] == "controller"]
    if not controllers or not controllers[0]["address"]:
        raise ExpertMeshError("the controller is just starting; try again in a moment")
    return f"http://{controllers[0]['address']}", admin_token(Path(state.run_dir))
