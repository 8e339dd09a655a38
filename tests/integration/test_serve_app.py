"""The Serve application in a Ray whose nodes have roles, which is what a RayService starts. Catches a process on a node
that is not meant for it, one that asks Ray's autoscaler for nothing, a cluster that ends with whoever asked for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster_fixture import free_port, private_environ, run
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

_SEEN = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
groups = {g["name"]: [g["state"], *g["bundles"].values()] for g in ray.util.placement_group_table().values()}
view = ray.get(ray.get_actor("controller", "expertmesh").watch.remote(0))
roles = {node["NodeID"]: [r for r in node["Resources"] if r.startswith("expertmesh_")] for node in ray.nodes()}
where = {member.id: roles[member.node] for member in view.members}
print(json.dumps({"groups": groups, "where": where}))
"""


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.fixture
def ray_nodes(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head without CPUs and a node for each role; its address and environment."""
    port, directory = free_port(), tempfile.mkdtemp(prefix="em-ray-")  # tmp_path is too long for Unix sockets
    address, environ = f"127.0.0.1:{port}", private_environ(tmp_path / "nodes")
    # Who has a token of Ray's somewhere is else asked for it by `ray start` alone.
    environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    head = ["--head", "--port", str(port), "--num-cpus", "0", "--temp-dir", directory, "--include-dashboard", "false"]
    nodes: list[psutil.Popen] = []

    def start(*arguments: str) -> None:
        common = ["--block", "--object-store-memory", "80000000"]
        with (tmp_path / f"node-{len(nodes)}.log").open("w") as log:
            command = [program("ray"), "start", *common, *arguments]
            nodes.append(psutil.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True))

    try:
        start(*head)
        wait_until(lambda: "Ray runtime started" in (tmp_path / "node-0.log").read_text(), 60)
        for role in ("expertmesh_router", "expertmesh_expert"):  # one by one: nodes of one host draw the same ports
            start("--address", address, "--num-cpus", "1", "--resources", json.dumps({role: 2}))
            log = tmp_path / f"node-{len(nodes) - 1}.log"
            wait_until(lambda log=log: "Ray runtime started" in log.read_text(), 60)  # type: ignore[misc]
        yield address, environ
    finally:
        family: list[psutil.Process] = list(nodes)
        for node in nodes:
            with suppress(psutil.NoSuchProcess):
                family += node.children(recursive=True)
                node.terminate()
        for process in psutil.wait_procs(family, timeout=3)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(directory, ignore_errors=True)


def test_a_model_is_served_by_the_nodes_that_are_meant_for_it(
    tmp_path: Path, tiny_checkpoint: Path, ray_nodes: tuple[str, dict[str, str]]
) -> None:
    (address, environ), port, token = ray_nodes, free_port(), tmp_path / "token"
    admin_port = free_port()
    token.write_text("secret\n")
    args: dict[str, Any] = {
        "model": str(tiny_checkpoint), "expert_workers": 2, "kv_cache_mb": 16, "trusted_network": True,
        "require_node_roles": True, "admin_token_file": str(token), "admin_host": "127.0.0.1", "admin_port": admin_port,
        "rebalance": False,
    }  # fmt: skip
    application: dict[str, Any] = {
        "name": "expertmesh", "route_prefix": "/", "import_path": "cluster.serve_app:app",
        "external_scaler_enabled": True, "args": args,
    }  # fmt: skip
    file = tmp_path / "serve.json"

    def deploy() -> None:
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        file.write_text(json.dumps(config))  # JSON is YAML
        command = [program("serve"), "run", str(file), "--address", address, "--non-blocking"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    def answer() -> str:
        body = {"model": tiny_checkpoint.name, "prompt": "once", "max_tokens": 8, "temperature": 0}
        try:
            response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else ""
        except (httpx.HTTPError, ValueError):
            return ""

    deploy()
    wait_until(lambda: answer() != "", 180)
    expected = answer()
    command = [sys.executable, "-c", _SEEN, address]
    seen = json.loads(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)
    assert seen["groups"] == {
        "expertmesh:expert-0": ["CREATED", {"expertmesh_expert": 1.0}],
        "expertmesh:expert-1": ["CREATED", {"expertmesh_expert": 1.0}],
        "expertmesh:router-0": ["CREATED", {"expertmesh_router": 1.0}],
    }
    where = seen["where"]
    assert where["router-0"] == ["expertmesh_router"] and where["expert-0"] == where["expert-1"] == [
        "expertmesh_expert"
    ]
    assert where["controller"] == []

    outside = environ | {
        "EXPERTMESH_ADMIN_URL": f"http://127.0.0.1:{admin_port}", "EXPERTMESH_ADMIN_TOKEN_FILE": str(token)
    }  # fmt: skip
    more = run("scale", "--routers", "2", "--gateways", "2", environ=outside)
    assert more.returncode == 0, more.stderr
    assert answer() == expected
    too_many = run("scale", "--expert-workers", "3", "--timeout-s", "3", environ=outside)
    assert too_many.returncode == 1 and "expert-2 did not start within 3 s" in too_many.stderr
    args |= {"routers": 1, "gateways": 1}  # the application says so again: the cluster that runs is scaled
    deploy()
    headers = {"Authorization": "Bearer secret"}

    def processes() -> dict[str, Any]:
        fleet = httpx.get(f"http://127.0.0.1:{admin_port}/fleet", headers=headers, timeout=30).json()
        return {"scaling": fleet["scaling"], **fleet["processes"]}

    wanted = {"scaling": None, "workers": ["expert-0", "expert-1"], "routers": ["router-0"], "gateways": 1}
    wait_until(lambda: processes() == wanted, 60)
    assert answer() == expected
