"""Processes that die, hang or lose each other under streams. Catches a request that fails or changes, a loss that waits
for Python to start, and a router that goes on with requests for which it cannot reach an expert."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_fixture import RunningCluster, running_cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[RunningCluster]:
    options = ("--routers", "2", "--expert-workers", "3", "--kv-cache-mb", "16", "--weights", "peer", "--allow-chaos")
    with running_cluster(tmp_path_factory.mktemp("failover"), tiny_checkpoint, *options) as running:
        yield running


def chaos(fleet: RunningCluster, *arguments: str) -> dict[str, Any]:
    """What clients saw: nothing wrong, or this fails."""
    done = fleet.command("chaos", *arguments, "--url", fleet.url, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert not seen["errors"] and not seen["changed"] and seen["streams"] >= 8
    return seen


def receipts(fleet: RunningCluster) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = json.loads(fleet.command("placement", "receipts").stdout)
    return done


def test_survivors_take_over_what_a_killed_worker_held_alone(fleet: RunningCluster) -> None:
    assert fleet.command("placement", "pin", "0:1@expert-2").returncode == 0
    assert "0:1@expert-2 is pinned" in fleet.command("placement", "show").stdout
    chaos(fleet, "kill", "expert-1")
    [taken] = [receipt for receipt in receipts(fleet) if receipt["action"] == "fail-over of expert-1"]
    assert taken["added"] > 0 and not taken["error"]
    wait_until(lambda: receipts(fleet)[-1]["action"] == "end of the fail-over")
    placement = json.loads(fleet.command("placement", "show", "--json").stdout)
    assert placement["pins"] == ["0:1@expert-2"]
    spread = [len(homes) for experts in placement["homes"] for homes in experts]
    assert sum(spread) == len(spread) + 1, "what was added goes again, but for the pinned replica"


def test_a_router_that_hangs_is_given_up_by_its_gateway(fleet: RunningCluster) -> None:
    """For so long that its requests go on elsewhere meanwhile."""
    chaos(fleet, "pause", "router-1", "--seconds", "4", "--tokens", "200")


def test_requests_of_a_router_that_is_cut_off_go_on_elsewhere(fleet: RunningCluster) -> None:
    states: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            states.add(fleet.members("router")["router-0"]["state"])
            time.sleep(0.2)

    watching = threading.Thread(target=look)
    watching.start()
    try:
        chaos(fleet, "partition", "router-0", "expert-2", "--seconds", "5", "--tokens", "200")
    finally:
        over.set()
        watching.join()
    assert "isolated" in states
    wait_until(fleet.ready)
