"""`expertmesh status --watch`: the cluster in a terminal, live, from what the controller says."""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.errors import ExpertMeshError

INTERVAL_S = 0.5
_BAR = 24
_EVENTS = 8
_STYLES = {"ready": "green", "lost": "red", "isolated": "red"}
_LEVELS = {"good": "green", "warning": "yellow", "error": "red"}

Look = Callable[[int, int], dict[str, Any]]  # the known epoch and event -> `cluster.control.observation.observe`


def watch(title: str, look: Look, console: Console, interval_s: float = INTERVAL_S) -> None:
    """Show what `look` says until Ctrl-C; the terminal is then as it was before.

    While `look` raises ExpertMeshError the last picture stays, with the reason above it. Raises it when there is no
    picture yet, and where the output is no terminal.
    """
    if not console.is_terminal:
        raise ExpertMeshError("--watch needs a terminal; `expertmesh status --json` is for programs")
    ended = signal.signal(signal.SIGTERM, _interrupt)
    seen, events = look(0, 0), deque[dict[str, Any]](maxlen=_EVENTS)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            trouble = ""
            while True:
                events.extend(seen.pop("events", ()))
                live.update(picture(title, seen, list(events), trouble), refresh=True)
                time.sleep(interval_s)
                try:
                    seen, trouble = look(seen["epoch"], events[-1]["number"] if events else 0), ""
                except ExpertMeshError as error:
                    trouble = str(error)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, ended)


def picture(title: str, seen: dict[str, Any], events: list[dict[str, Any]], trouble: str = "") -> Group:
    """One look as a terminal shows it."""
    imbalance = "not known yet" if seen["imbalance"] is None else f"{seen['imbalance']:.3f}"
    lines = [
        Text.assemble((title, "bold"), f"  epoch {seen['epoch']}", "" if seen["acknowledged"] else " (routers follow)"),
        Text.assemble("imbalance ", (imbalance, "bold"), f" (max / mean rows, {seen['window_s']:g} s window)"),
        Text(f"under way: {seen['change']}" if seen["change"] else _rebalancer(seen["rebalancer"]), "dim"),
    ]
    if trouble:
        lines.append(Text(f"{trouble}; this is from before", "yellow"))
    return Group(*lines, Text(), _workers(seen), Text(), _others(seen), Text(), *map(_event, reversed(events)))


def _workers(seen: dict[str, Any]) -> Table:
    """Expert workers: state, slots, and the load of each against the busiest one's."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("expert worker", "state", "slots", "", "load", "rows/s", "× mean"):
        table.add_column(name, justify="right" if name in ("slots", "rows/s", "× mean") else "left", no_wrap=True)
    workers = sorted((m for m in seen["members"] if m["role"] == "expert"), key=lambda worker: _natural(worker["id"]))
    rows = [worker["rows"] or 0 for worker in workers]
    most, mean = max([1, *rows]), sum(rows) / max(1, len(rows))
    for worker, n in zip(workers, rows, strict=True):
        state = "drained" if worker["drained"] and worker["state"] == "ready" else worker["state"]
        slots = worker["slots"]
        table.add_row(
            worker["id"],
            Text(state, _STYLES.get(state, "yellow")),
            f"{worker['replicas']} of {slots}" if slots else str(worker["replicas"]),
            _bar(worker["replicas"] / slots, _BAR // 3, "dim") if slots else "",
            _bar(n / most, _BAR, "cyan"),
            f"{n / seen['window_s']:,.0f}",
            f"{n / mean:.2f}" if mean else "",
        )
    return table


def _others(seen: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for member in seen["members"]:
        if member["role"] in ("router", "gateway"):
            state = Text(member["state"], _STYLES.get(member["state"], "yellow"))
            table.add_row(member["id"], state, Text(_says(member["detail"]), "dim"))
    return table


def _says(detail: dict[str, Any]) -> str:
    match detail:
        case {"running": running, "waiting": waiting, "free_blocks": free, "total_blocks": total}:
            return f"{running} running, {waiting} waiting, {1 - free / max(total, 1):.0%} of the KV cache used"
        case {"open": n_open, "requests": requests}:
            waits = detail.get("first_token_s")
            return f"{n_open} open of {requests} requests" + (f", first token {waits[0]:.3f} s" if waits else "")
    return ""


def _rebalancer(health: dict[str, Any]) -> str:
    return "rebalancer off" if health["mode"] == "off" else f"rebalancer {health['mode']}: {health['decision']}"


def _event(event: dict[str, Any]) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    return Text.assemble((f"{at} ", "dim"), (event["text"], _LEVELS.get(event["level"], "")))


def _bar(part: float, width: int, style: str) -> Text:
    filled = round(width * min(max(part, 0.0), 1.0))
    return Text.assemble(("━" * filled, style), ("─" * (width - filled), "bright_black"))


def _natural(name: str) -> list[int | str]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
