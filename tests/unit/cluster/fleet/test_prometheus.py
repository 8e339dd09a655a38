"""Would catch: a Prometheus that does not find the processes, or keeps to those of the start, outlives its cluster, or
is missing without a word of what to do."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import StartError
from cluster.fleet import targets
from cluster.fleet.prometheus import Prometheus
from cluster.observe.discovery import Target
from cluster.observe.endpoint import Endpoint
from cluster.observe.exposition import Reading, Readings
from cluster.observe.series import router

_LIMIT_S = 120.0


def test_it_scrapes_the_processes_that_there_are_and_ends(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        assert not os.environ.get("CI"), "continuous integration has to have Prometheus"
        pytest.skip("Prometheus is not installed (Debian and Ubuntu: apt install prometheus)")
    shown = [Endpoint(readings(f"router-{i}", i), "127.0.0.1") for i in range(2)]
    found = [Target(f"router-{i}", "router", endpoint.url) for i, endpoint in enumerate(shown)]
    server = Prometheus(tmp_path)
    targets.write(tmp_path, found[:1], "here:8000")
    try:
        server.start(lambda: None)
        first = awaited(server, 1)
        assert first == {"router-0": ("here:8000", "router", "router-0", "0")}
        targets.write(tmp_path, found, "here:8000")
        assert awaited(server, 2) == first | {"router-1": ("here:8000", "router", "router-1", "1")}
    finally:
        server.stop()
        for endpoint in shown:
            endpoint.close()
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.url)


def test_without_one_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match="apt install prometheus"):
        Prometheus(tmp_path).start(lambda: None)


def readings(name: str, running: int) -> Readings:
    return Readings(name, [lambda: [Reading(router.RUNNING, running)]])


def awaited(server: Prometheus, n: int) -> dict[str, tuple[str, ...]]:
    """The labels and the value of `n` series, as soon as Prometheus has so many."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        query = {"query": "expertmesh_requests_running"}
        result: list[Any] = httpx.get(f"{server.url}/api/v1/query", params=query).json()["data"]["result"]
        if len(result) == n:
            return {
                each["metric"]["router"]: (
                    *(each["metric"][k] for k in ("cluster", "role", "instance")),
                    each["value"][1],
                )
                for each in result
            }
        time.sleep(0.2)
    raise AssertionError(f"Prometheus never had {n} series")
