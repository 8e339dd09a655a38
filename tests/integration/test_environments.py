"""`expertmesh serve` where it cannot work, or ceases to: would catch a start that fails without saying why, takes
minutes to, or leaves something behind."""

from __future__ import annotations

import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster_fixture import (
    alive,
    chat,
    lend_kernels,
    private_environ,
    running_cluster,
)

pytestmark = pytest.mark.cluster

STARTED = "process_start_time_seconds{"


def answered(scrape: str) -> str:
    """The gateway that answered a scrape."""
    found = re.search(r'expertmesh_process_scraped{gateway="([^"]+)"', scrape)
    assert found is not None
    return found[1]


def test_two_gateways_are_one_scrape(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Whichever gateway the port leads to, the answer holds the series of both; and an answer has one request id.

    Ends with what a clean-up of the temporary directory does to a cluster: it is noticed, said, and ends it.
    """
    options = ("--gateways", "2", "--transport", "local", "--kv-cache-mb", "16")
    with running_cluster(tmp_path, tiny_checkpoint, *options) as cluster:
        for _ in range(8):
            chat(cluster, "hello", max_tokens=2)
        # On a busy machine HAProxy may be replaced now and then; clients try again, as OpenAI's do.
        client = httpx.Client(base_url=cluster.url, transport=httpx.HTTPTransport(retries=5), timeout=30)
        scrapes = [client.get("/metrics").text for _ in range(8)]
        for text in scrapes:
            for name in ("gateway-0", "gateway-1"):
                assert f'expertmesh_process_scraped{{gateway="{answered(text)}",process="{name}"}} 1.0' in text
                assert f'expertmesh_process_resident_bytes{{process="{name}"}}' in text
        tokens = [line for line in scrapes[-1].splitlines() if line.startswith("expertmesh_generation_tokens_total")]
        assert sum(float(line.split()[-1]) for line in tokens) == 16

        asked = client.get("/version", headers={"x-request-id": "mine-1"})
        assert asked.headers.get_list("x-request-id") == ["mine-1"]
        assert len(client.get("/version").headers.get_list("x-request-id")) == 1
        client.close()

        # Each counts for itself, and the other answers when one is killed.
        urls = [process["metrics_url"] for process in cluster.status()["processes"] if process["role"] == "gateway"]
        assert len({line for url in urls for line in httpx.get(url).text.splitlines() if STARTED in line}) == 2
        answer = chat(cluster, "hello", max_tokens=8)
        cluster.kill("gateway-1")
        assert chat(cluster, "hello", max_tokens=8) == answer

        run_dir = Path(cluster.status()["run_dir"])
        family = cluster.family()
        shutil.rmtree(run_dir)
        told = cluster.command("status")
        assert told.returncode == 1
        assert f"{run_dir} was removed" in told.stderr
        assert cluster.process.wait(60) == 1
        last = cluster.log.read_text().strip().splitlines()[-1]
        assert str(run_dir) in last and "was removed" in last
        assert not alive(family)


def refused(environ: dict[str, str], *arguments: str, **options: object) -> str:
    """The one line on standard error of a start that fails."""
    command = [str(Path(sys.executable).with_name("expertmesh")), "serve", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return str(line)


def test_what_cannot_work_is_refused_by_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Before anything starts, within the time that `refused` gives it (Ray tried for eight minutes), and what to do."""
    environ = private_environ(tmp_path / "run")
    model = str(tiny_checkpoint)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        line = refused(environ | {"RAY_ADDRESS": gone}, model, "--trusted-network")
        assert f"no Ray at {gone}: Connection refused; unset RAY_ADDRESS" in line
        if not any(process.name() == "gcs_server" for process in psutil.process_iter()):  # it might be somebody's
            line = refused(environ | {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)}, model, "--trusted-network")
            assert "ray_address: `auto`, but Could not find any running Ray instance" in line

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    assert "only 1024 files may be open at once" in refused(environ, model, preexec_fn=few_files)
    (tmp_path / "file").touch()
    assert "state_dir: " in refused(environ, model, "--state-dir", str(tmp_path / "file" / "x"))
    assert not list((tmp_path / "run").rglob("*.json"))


def test_a_start_of_ray_that_fails_says_the_cause_and_leaves_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Ray itself says only that a core worker has been shut down."""
    state = tmp_path / "state"
    lend_kernels(state)
    before = set(Path("/tmp").glob("em-*"))
    environ = private_environ(tmp_path / "run") | {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": "/nonexistent"}
    line = refused(environ, str(tiny_checkpoint), "--state-dir", str(state))
    assert "cannot start Ray: " in line
    (logs,) = (state / "expertmesh" / "logs").iterdir()
    assert line.endswith(f"(logs: {logs})")
    assert any(logs.iterdir())
    assert set(Path("/tmp").glob("em-*")) <= before
