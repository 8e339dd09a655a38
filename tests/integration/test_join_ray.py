"""`expertmesh serve` in a Ray that runs already. Catches a token that is not shown, a Serve that
outlives its cluster and keeps its port."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.cluster_fixture import chat, free_port, private_environ, run, running_cluster
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[tuple[psutil.Popen, str]]:
    """`ray start --head`, as whoever runs a Ray for several purposes would; its address."""
    port = free_port()
    directory = tempfile.mkdtemp(prefix="em-ray-")  # tmp_path is too long for Ray's Unix sockets
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port", str(port),
        "--num-cpus", "2", "--include-dashboard", "false", "--object-store-memory", "80000000",
        "--temp-dir", directory,
    ]  # fmt: skip
    with (tmp_path / "ray.log").open("w") as log:
        environ = private_environ(tmp_path / "head")
        head = psutil.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until(lambda: listens(port), 60)
        yield head, f"127.0.0.1:{port}"
    finally:
        family = [*head.children(recursive=True), head]
        head.terminate()
        for process in psutil.wait_procs(family, timeout=15)[1]:
            process.kill()
        shutil.rmtree(directory, ignore_errors=True)


def test_one_cluster_after_the_other_joins_a_ray(
    tmp_path: Path, tiny_checkpoint: Path, ray_head: tuple[psutil.Popen, str]
) -> None:
    head, address = ray_head
    options = ("--ray-address", address, "--trusted-network", "--transport", "local", "--kv-cache-mb", "16")
    (tmp_path / "one").mkdir()
    with running_cluster(tmp_path / "one", tiny_checkpoint, *options) as one:
        answer = chat(one, "hello", max_tokens=8)
        second = run("serve", str(tiny_checkpoint), *options, "--port", str(free_port()), environ=one.environ)
        assert second.returncode == 1 and "runs an ExpertMesh already" in second.stderr, second.stderr
        assert chat(one, "hello", max_tokens=8) == answer
        refused = run("stop", "--ray-address", address, environ=one.environ)
        assert refused.returncode == 1 and "runs an ExpertMesh already" in refused.stderr, refused.stderr
        one.process.kill()  # what Serve runs is left behind, and goes on listening
        one.process.wait(10)
    assert listens(one.port)
    cleared = run("stop", "--ray-address", address, environ=one.environ)
    assert cleared.returncode == 0, cleared.stderr
    assert not listens(one.port)
    (tmp_path / "two").mkdir()
    with running_cluster(tmp_path / "two", tiny_checkpoint, *options, "--gateways", "2") as two:
        assert chat(two, "hello", max_tokens=8) == answer
        gateways = sorted(process["id"] for process in two.status()["processes"] if process["role"] == "gateway")
        assert gateways == ["gateway-0", "gateway-1"]
        assert two.command("stop").returncode == 0
        assert two.process.wait(30) == 0
    assert not listens(two.port)
    assert not [process.name() for process in head.children(recursive=True) if "Serve" in process.name()]
