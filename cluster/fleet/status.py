"""`expertmesh status` and `expertmesh stop`: find the running cluster, show it, end it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from cluster.errors import ExpertMeshError
from cluster.fleet.run_state import find
from cluster.fleet.snapshot import read

_MIB = 2**20
_POLL_S = 0.05


def processes(port: int | None = None) -> list[dict[str, Any]]:
    """The processes of the running cluster: role, id, pid, node, state, address, metrics_url, epoch, detail."""
    found: list[dict[str, Any]] = read(port)["processes"]
    return found


def show(content: dict[str, Any], console: Console) -> None:
    """Print a snapshot for people."""
    how = f"over {content['transport']} [dim]({content['transport_reason']})[/]"
    console.print(f"{content['model']} at [bold]{content['url']}[/] {how}", highlight=False)
    if not content["listening"]:
        console.print(f"[yellow]port {content['url'].rsplit(':', 1)[-1]} refuses connections[/]", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    on_gpu = any("gpu" in process["detail"] for process in content["processes"])
    for column in ("id", "state", "pid", "memory", *(["GPU"] if on_gpu else []), "address", ""):
        right = column in ("pid", "memory")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "")
    for process in content["processes"]:
        state = process["state"] if process["state"] == "ready" else f"[yellow]{process['state']}[/]"
        address = process["address"].removeprefix("http://")
        says = f"[dim]{_says(process['role'], process['detail'])}[/]"
        gpu = [_gpu(process["detail"])] if on_gpu else []
        table.add_row(process["id"], state, str(process["pid"]), _memory(process["pid"]), *gpu, address, says)
    console.print(table)


def stop(port: int | None, timeout_s: float) -> str:
    """End the running cluster in good order and say so. ExpertMeshError when it does not end in time."""
    state = find(port)
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while state.alive:
        if time.monotonic() > deadline:
            raise ExpertMeshError(f"process {state.pid} has not ended within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return f"stopped {state.model} at {state.url}"


def _says(role: str, detail: dict[str, Any]) -> str:
    """The numbers of a process that fit beside its name; --json has them all."""
    match role, detail:
        case "expert", {"experts": experts, "weight_bytes": size}:
            return f"{experts} experts, {size // _MIB} MiB"
        case "router", {"running": running, "waiting": waiting, "free_blocks": free, "total_blocks": total}:
            return f"{running} running, {waiting} waiting, {total - free} of {total} KV blocks used"
        case "gateway", {"open": n_open, "requests": requests}:
            return f"{n_open} open of {requests} requests"
        case "controller", {"imbalance": imbalance}:
            return f"workers' imbalance {imbalance:.3f} (max / mean rows of the last minute)"
    return ""


def _gpu(detail: dict[str, Any]) -> str:
    """A process's GPU: which, what it holds of it and what all hold, how busy it is."""
    match detail:
        case {"gpu": name, "device": device, "gpu_own_bytes": own, "gpu_used_bytes": used, "gpu_total_bytes": total}:
            percent = f", {detail['gpu_percent']}%" if "gpu_percent" in detail else ""
            return f"{device} {name}: {own / 2**30:.1f} of {used / 2**30:.1f} of {total / 2**30:.0f} GiB{percent}"
    return ""


def _memory(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).memory_info().rss // _MIB} MiB"
    except psutil.Error:  # of another node, or gone
        return ""
