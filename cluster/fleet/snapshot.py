"""The state of a running cluster as a file, kept by `expertmesh serve`, read by `expertmesh status`.

A file, because asking is then instant and disturbs nothing, and because it tells something even when Ray does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.control.view import Member, View
from cluster.errors import ExpertMeshError
from cluster.fleet import targets
from cluster.fleet.run_state import RunState, find

_NAME = "status.json"
_STALE_S = 15.0  # it is written every second, and with every change


def write(state: RunState, view: View) -> None:
    """Replace the snapshot of the cluster. A full disk costs the snapshot, which `read` notices, not the cluster."""
    content = {
        "model": state.model,
        "url": state.url,
        "pid": state.pid,
        "ray_address": state.ray_address,
        "run_dir": state.run_dir,
        "transport": state.transport,
        "transport_reason": state.transport_reason,
        "epoch": view.placement.epoch,
        "group": None if view.group is None else asdict(view.group),
        "draining": view.draining,
        "written": time.time(),
        "processes": [_process(member) for member in view.members],
    }
    targets.write(Path(state.run_dir), view.targets(), state.cluster)
    draft = Path(state.run_dir, f"{_NAME}.{os.getpid()}")
    with contextlib.suppress(OSError):
        draft.write_text(json.dumps(content, indent=2), encoding="utf-8")
        draft.replace(Path(state.run_dir, _NAME))


def _process(member: Member) -> dict[str, Any]:
    number = None if member.group is None else member.group.number
    return asdict(member) | {"group": number}


def read(port: int | None = None, max_age_s: float = _STALE_S) -> dict[str, Any]:
    """The snapshot of the running cluster, on `port` if there are several. ExpertMeshError when there is none, or one
    older than `max_age_s`."""
    state = find(port)
    try:
        content: dict[str, Any] = json.loads(Path(state.run_dir, _NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not Path(state.run_dir).is_dir():
            raise ExpertMeshError(
                f"{state.run_dir} was removed while the cluster on port {state.port} ran (process {state.pid}), "
                "and with it the way in: `expertmesh stop`, and start it again"
            ) from None
        raise ExpertMeshError(f"the cluster on port {state.port} is just starting (process {state.pid})") from None
    if time.time() - content["written"] > max_age_s:
        full = os.statvfs(state.run_dir).f_bavail == 0
        why = f", since the disk of {state.run_dir} is full: free some of it" if full else ""
        raise ExpertMeshError(f"`expertmesh serve` (process {state.pid}) has said nothing for {max_age_s:g} s{why}")
    return content | {"listening": _listens(state)}


def _listens(state: RunState) -> bool:
    """Whether the port takes connections, whatever the processes behind it say of themselves."""
    try:
        socket.create_connection((urlsplit(state.url).hostname or "", state.port), timeout=2.0).close()
    except OSError:
        return False
    return True
