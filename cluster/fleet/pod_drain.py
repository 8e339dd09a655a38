"""`python -m cluster.fleet.pod_drain ROLE SECONDS`: what a pod does before it is ended, of which Ray knows nothing.

A router's pod waits until the requests of its gateway are answered; it gets no new ones, since a pod that ends is in no
Service any more. An expert's pod gives its experts to others, so that no request waits for them; where these have no
room, survivors load them once they are gone. Both leave at once when nobody answers, as when all pods are ended.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

METRICS_PORT, MOST_PROCESSES = 9400, 32
ADMIN_PORT = 8100
TOKEN = Path("/etc/expertmesh/admin/admin-token")
_TICK_S = 1.0
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy leads to processes of ours
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Sample = tuple[str, Mapping[str, str], float]  # name, labels, value


def drain_router(address: str, seconds: float) -> float:
    """Wait until the gateways at `address` have no open request, at most `seconds`. How many are left."""
    deadline = time.monotonic() + seconds
    while (n_open := sum(value for name, _, value in samples(address) if name == "expertmesh_requests_open")) > 0:
        if time.monotonic() > deadline:
            break
        time.sleep(_TICK_S)
    return n_open


def drain_experts(address: str, head: str, token: str, seconds: float) -> list[str]:
    """Have the experts of the workers at `address`, a Ray node, moved elsewhere within `seconds`. Who was emptied."""
    workers = [labels["process"] for name, labels, _ in samples(address)
               if name == "expertmesh_build_info" and labels.get("role") == "expert"]  # fmt: skip

    if not workers:
        return []
    url = f"http://{head}:{ADMIN_PORT}/workers/{workers[0]}/node/drain"
    try:
        _OPEN(urllib.request.Request(url, b"", {"Authorization": f"Bearer {token}"}), timeout=seconds).close()
    except urllib.error.HTTPError as error:  # there is no room
        print(f"{error}: {error.read().decode(errors='replace')}", file=sys.stderr)
    except OSError as error:  # nobody answers
        print(error, file=sys.stderr)
    else:
        return workers
    return []


def samples(address: str) -> Iterator[Sample]:
    """The series of every process at `address`, each at the first port that was free when it started."""
    for port in range(METRICS_PORT, METRICS_PORT + MOST_PROCESSES):
        try:
            with _OPEN(f"http://{address}:{port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            if found := _SAMPLE.match(line):
                yield found[1], dict(_LABEL.findall(found[2] or "")), float(found[3])


def main() -> None:
    role, seconds = sys.argv[1], float(sys.argv[2])
    address = os.environ.get("POD_IP") or socket.gethostbyname(socket.gethostname())
    if role == "router":
        print(f"{drain_router(address, seconds):.0f} requests are left")
    else:
        token = TOKEN.read_text(encoding="utf-8").strip()
        print("emptied:", ", ".join(drain_experts(address, os.environ["FQ_RAY_IP"], token, seconds)) or "nobody")


if __name__ == "__main__":
    main()
