"""Experts that move while streams run. Catches a token that changes or is lost, a verb that leaves half of itself,
and a controller that comes back with an older placement."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.fleet.run_state import admin_token
from cluster.routing.counts import RoutingCounts
from cluster.routing.trace import Header, Window, append
from tests.cluster_fixture import RunningCluster, running_cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

_STREAMS = 8
_TOKENS = 400


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[RunningCluster]:
    directory = tmp_path_factory.mktemp("placement")
    options = ("--routers", "2", "--expert-workers", "3", "--kv-cache-mb", "32", "--expert-slots", "16")
    with running_cluster(directory, tiny_checkpoint, *options) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: RunningCluster) -> list[str]:
    """The answer of each stream while nothing else happens."""
    with ThreadPoolExecutor(_STREAMS) as pool:
        return list(pool.map(lambda i: answer(fleet, i), range(_STREAMS)))


def admin(fleet: RunningCluster) -> httpx.Client:
    """The admin API, wherever the controller is by now."""
    wait_until(lambda: fleet.members("controller")["controller"]["address"] != "")
    headers = {"Authorization": f"Bearer {admin_token(Path(fleet.look()['run_dir']))}"}
    address = fleet.members("controller")["controller"]["address"]
    return httpx.Client(base_url=f"http://{address}", headers=headers, timeout=60)


def answer(fleet: RunningCluster, i: int) -> str:
    """The tokens of one stream, every other one sampled with a seed."""
    body = {"model": fleet.model, "prompt": f"Story {i}", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True,
            "temperature": 0.0 if i % 2 else 0.8, "seed": i}  # fmt: skip
    said = []
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                said += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
    return "".join(said)


class Load:
    """Streams without end, each compared with the undisturbed run; an exception of one is an error."""

    def __init__(self, fleet: RunningCluster, undisturbed: list[str]) -> None:
        self.undisturbed = undisturbed
        self.compared = 0
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(fleet, i)) for i in range(_STREAMS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors[:3]
        assert self.compared >= _STREAMS

    def _run(self, fleet: RunningCluster, i: int) -> None:
        while not self._stop.is_set() and not self.errors:
            try:
                same = answer(fleet, i) == self.undisturbed[i]
            except Exception as error:
                self.errors.append(repr(error))
            else:
                self.compared += 1
                if not same:
                    self.errors.append(f"stream {i} has other tokens")


def random_verb(client: httpx.Client, rng: random.Random) -> httpx.Response:
    """One that may well be refused."""
    homes = client.get("/placement").json()["homes"]
    layer, expert = rng.randrange(len(homes)), rng.randrange(len(homes[0]))
    holders, target = sorted(homes[layer][expert]), f"expert-{rng.randrange(3)}"
    body: dict[str, Any] = {"layer": layer, "expert": expert}
    match rng.choice(["move", "replicate", "drop"]):
        case "move":
            return client.post("/placement/move", json=body | {"source": rng.choice(holders), "target": target})
        case "replicate":
            return client.post("/placement/replicate", json=body | {"worker": target})
        case _:
            return client.post("/placement/drop", json=body | {"worker": rng.choice(holders)})


def held(fleet: RunningCluster) -> dict[str, int]:
    return {id_: process["detail"].get("experts", 0) for id_, process in fleet.members("expert").items()}


def test_random_moves_under_streams_change_no_token(fleet: RunningCluster, undisturbed: list[str]) -> None:
    rng = random.Random(0)
    with Load(fleet, undisturbed), admin(fleet) as client:
        done = 0
        while done < 40:
            response = random_verb(client, rng)
            assert response.status_code in (200, 409), response.text
            if response.status_code == 200:
                done += 1
        drained = client.post("/workers/expert-1/drain")
        assert drained.status_code == 200, drained.text
        shown = client.get("/placement").json()
        assert all("expert-1" not in homes for experts in shown["homes"] for homes in experts)
        assert client.post("/workers/expert-1/undrain").status_code == 200
        rebalanced = client.post("/rebalance", json={})
        assert rebalanced.status_code == 200, rebalanced.text
    with admin(fleet) as client:
        wanted = {worker["id"]: worker["replicas"] for worker in client.get("/placement").json()["workers"]}
    wait_until(lambda: held(fleet) == wanted)


def test_a_killed_controller_and_a_killed_worker_keep_the_placement(
    fleet: RunningCluster, undisturbed: list[str]
) -> None:
    with admin(fleet) as client:
        homes = client.get("/placement").json()["homes"]
        for expert in range(2):
            target = next(f"expert-{i}" for i in range(3) if f"expert-{i}" not in homes[0][expert])
            body = {"layer": 0, "expert": expert, "source": sorted(homes[0][expert])[0], "target": target}
            assert client.post("/placement/move", json=body).status_code == 200
        before = client.get("/placement").json()
    with Load(fleet, undisturbed):
        fleet.kill("controller")
        with admin(fleet) as client:
            wait_until(lambda: client.get("/placement").json()["epoch"] >= before["epoch"])
            assert client.get("/placement").json()["homes"] == before["homes"]
        fleet.kill("expert-2")
        with admin(fleet) as client:
            response = client.post("/placement/replicate", json={"layer": 1, "expert": 0})
            assert response.status_code == 200, response.text
            assert client.get("/placement").json()["epoch"] > before["epoch"]  # fail-over has epochs of its own


def test_processes_come_and_go_under_streams(fleet: RunningCluster, undisturbed: list[str]) -> None:
    """Would catch a worker that gets rows before its experts, one that is ended with experts only it has, a router or a
    gateway that is ended with requests, and one that gets none."""
    with Load(fleet, undisturbed):
        more = fleet.command("scale", "--expert-workers", "4", "--routers", "3", "--gateways", "2")
        assert more.returncode == 0, more.stderr
        wait_until(lambda: held(fleet).get("expert-3", 0) > 0)
        wait_until(lambda: fleet.members("gateway").keys() == {"gateway-0", "gateway-1"})
        wait_until(lambda: "router-2" in fleet.members("router"))
        wait_until(lambda: fleet.members("router")["router-2"]["detail"].get("tokens", 0) > _TOKENS)
        fewer = fleet.command("scale", "--expert-workers", "2", "--routers", "1", "--gateways", "1")
        assert fewer.returncode == 0, fewer.stderr
        wait_until(lambda: held(fleet).keys() == {"expert-0", "expert-1"})
        wait_until(lambda: fleet.members("router").keys() == {"router-0"})
        wait_until(lambda: len(fleet.members("gateway")) == 1, 60)
        back = fleet.command("scale", "--expert-workers", "3", "--routers", "2")
        assert back.returncode == 0, back.stderr
    refused = fleet.command("scale", "--expert-workers", "1")
    assert refused.returncode == 1 and "do not fit into the 15 slots of 1 worker" in refused.stderr
    wait_until(lambda: len(held(fleet)) == 3)


def test_a_controller_killed_in_the_middle_of_a_scaling_goes_on_with_it(
    fleet: RunningCluster, undisturbed: list[str]
) -> None:
    """It knows of that, and of who is drained, from the members alone: its arguments are those of the first start."""
    with Load(fleet, undisturbed):
        with admin(fleet) as client:
            workers = client.get("/fleet").json()["processes"]["workers"]
            assert client.post(f"/workers/{workers[1]}/drain").status_code == 200
            asking = threading.Thread(target=fleet.command, args=("scale", "--expert-workers", "4"))
            asking.start()
            wait_until(lambda: client.get("/fleet").json()["scaling"] is not None)
        fleet.kill("controller")
        asking.join()

        def goal() -> dict[str, Any]:
            with admin(fleet) as client:
                return dict(client.get("/fleet").json())

        wait_until(lambda: goal()["scaling"] is None, 60)
        after = goal()
        assert after["drained"] == [workers[1]]
        assert set(after["processes"]["workers"]) in (set(workers), {*workers, "expert-3"})
        wait_until(lambda: held(fleet).keys() == set(after["processes"]["workers"]))
        with admin(fleet) as client:
            homes = client.get("/placement").json()["homes"]
            assert all(workers[1] not in home for experts in homes for home in experts)
            assert client.post(f"/workers/{workers[1]}/undrain").status_code == 200
        assert fleet.command("scale", "--expert-workers", "3").returncode == 0


def test_the_command_line_says_what_was_done_and_why_not(fleet: RunningCluster) -> None:
    with admin(fleet) as client:
        homes = client.get("/placement").json()["homes"]
        assert httpx.get(f"{client.base_url}/placement").status_code == 401
        schema = httpx.get(f"{client.base_url}/openapi.json").json()
        assert {"/placement", "/placement/move", "/rebalance", "/workers/{worker}/drain"} <= schema["paths"].keys()
    assert fleet.command("placement", "show").stdout.startswith("epoch ")
    holder = sorted(homes[1][3])[0]
    target = next(f"expert-{i}" for i in range(3) if f"expert-{i}" not in homes[1][3])
    moved = fleet.command("placement", "move", "1:3", "--from", holder, "--to", target)
    assert moved.returncode == 0 and "1 replicas loaded, 1 unloaded" in moved.stdout, moved.stderr
    for arguments, reason in (
        (("placement", "move", "1:3", "--from", holder, "--to", target), "has no replica"),
        (("placement", "move", "1:3", "--from", target, "--to", "expert-9"), "there is no expert worker expert-9"),
        (("placement", "drop", f"99:0@{target}"), "there is no layer 99"),
        (("placement", "drop", "1:3"), "names no worker"),
        (("drain", "expert-7"), "there is no expert worker expert-7"),
        (("placement", "unpin", f"1:3@{target}"), "is not pinned"),
        (("chaos", "kill", "expert-0", "--streams", "0", "--url", fleet.url), "not started with --allow-chaos"),
    ):
        refused = fleet.command(*arguments)
        assert refused.returncode == 1 and reason in refused.stderr, (arguments, refused.stderr)
    assert "replicas to load" in fleet.command("rebalance", "--dry-run").stdout
    trace = fleet.log.with_name("trace.jsonl")
    counts = RoutingCounts.zeros(len(homes), len(homes[0]))
    counts.chosen_LE[:, 0] = 1000
    append(trace, Header("tiny", len(homes), len(homes[0]), 2, 1.0), Window("texts", 0.0, 1.0, counts))
    planned = json.loads(fleet.command("placement", "plan", "--trace", str(trace), "--json").stdout)
    assert len(planned["homes"][0][0]) > 1, "the one expert with rows has several homes"
    receipts = json.loads(fleet.command("placement", "receipts").stdout)
    errors = {receipt["action"]: receipt["error"] for receipt in receipts}
    assert errors[f"move layer 1, expert 3 to {target}"] == ""
    assert "there is no expert worker expert-9" in errors["move layer 1, expert 3 to expert-9"]
