"""`expertmesh serve` where people really start it: from a wheel, in a path with a space, as whoever a container makes
them, beside folders with our names, with too little of something. Would catch a start that fails there, fails without
saying why, or leaves something behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster_fixture import (
    RunningCluster,
    alive,
    chat,
    free_port,
    private_environ,
    run,
    running_cluster,
    wait_until,
)

pytestmark = pytest.mark.cluster

NOBODY = 1_000_770_000  # as OpenShift gives them: no entry in the user database
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert next(dist.glob("expertmesh-*.tar.gz"))
    return next(dist.glob("expertmesh-*.whl"))


@pytest.fixture(scope="module")
def expertmesh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, installed from the wheel into an environment of its own, in a path with a space.

    What it depends on comes from the environment of the tests: only this package's files are installed.
    """
    directory = tmp_path_factory.mktemp("my proj") / ".venv"
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    packages = next((directory / "lib").glob("python*")) / "site-packages"
    ours = [path for path in sys.path if path.endswith("site-packages") and not (Path(path) / "cluster").is_dir()]
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return directory / "bin" / "expertmesh"


@pytest.fixture
def reachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], None]]:
    """Lets other users into a path that pytest made for this one alone; until the end of the test."""
    changed: dict[Path, int] = {}
    ours = tmp_path_factory.getbasetemp().parent

    def let_in(path: Path) -> None:
        for parent in (path, *path.parents):
            if parent.is_relative_to(ours):
                changed.setdefault(parent, parent.stat().st_mode & 0o777)
                parent.chmod(0o755)

    yield let_in
    for path, mode in changed.items():
        path.chmod(mode)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user")
def test_as_whoever_a_container_makes_us(
    expertmesh: Path, reachable: Callable[[Path], None], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """No entry in the user database, `HOME=/`, nothing inherited, umask 077, folders with our names around; it starts,
    answers, is found by `status`, and leaves nothing but its private state directory."""
    here = tmp_path / "here"
    for name in ("cluster", "workers"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise SystemExit('imported from the current directory')")
    (here / "ray.py").write_text("raise SystemExit('imported from the current directory')")
    for path in (here, expertmesh.parent, tiny_checkpoint):
        reachable(path)
    # To read is all that is left of root, since the interpreter may lie in root's home.
    capabilities = "-all,+dac_read_search"
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
              f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]  # fmt: skip
    environ = {"PATH": os.environ["PATH"], "HOME": "/"}
    port = free_port()
    state = Path("/tmp", f"expertmesh-{NOBODY}")
    shutil.rmtree(state, ignore_errors=True)
    log = tmp_path / "log"
    command = [*become, str(expertmesh), "serve", str(tiny_checkpoint), "--port", str(port), "--kv-cache-mb", "16"]
    with log.open("w") as file:
        process = psutil.Popen(command, cwd=here, env=environ, umask=0o077, stdout=file, stderr=subprocess.STDOUT)
    cluster = RunningCluster(process, f"http://127.0.0.1:{port}", port, tiny_checkpoint.name, log, environ)
    try:
        wait_until(lambda: "ready in" in log.read_text() or process.poll() is not None, 120)
        assert chat(cluster, "hello", max_tokens=4), log.read_text()
        status = subprocess.run([*become, str(expertmesh), "status"], cwd=here, env=environ, capture_output=True)
        assert b"router-0" in status.stdout, status.stderr
        family = cluster.family()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert log.read_text().rstrip().endswith("stopped")
        assert "Traceback" not in log.read_text()
        assert not alive(family)
        assert state.stat().st_mode & 0o777 == 0o700
        mine = [path for path in Path("/tmp").iterdir() if path.lstat().st_uid == NOBODY]
        assert mine == [state]
    finally:
        if process.poll() is None:
            process.kill()
        shutil.rmtree(state, ignore_errors=True)


def answered(scrape: str) -> str:
    """The gateway that answered a scrape."""
    found = re.search(r'expertmesh_process_scraped{gateway="([^"]+)"', scrape)
    assert found is not None
    return found[1]


def test_two_gateways_are_one_scrape(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Whichever gateway the port leads to, the answer holds the series of both; and an answer has one request id.

    Ends with what a clean-up of the temporary directory does to a cluster: it is noticed, said, and ends it.
    """
    options = ("--gateways", "2", "--transport", "local", "--kv-cache-mb", "16", "--state-dir", str(tmp_path / "state"))
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

        status = ("status", "--state-dir", str(tmp_path / "state"))
        assert cluster.command(*status).returncode == 0
        run_dir = Path(json_of(cluster, *status)["run_dir"])
        family = cluster.family()
        shutil.rmtree(run_dir)
        told = cluster.command(*status)
        assert told.returncode == 1
        assert f"{run_dir} was removed" in told.stderr
        assert cluster.process.wait(60) == 1
        last = cluster.log.read_text().strip().splitlines()[-1]
        assert str(run_dir) in last and "was removed" in last
        assert not alive(family)


def json_of(cluster: RunningCluster, *arguments: str) -> dict[str, str]:
    return dict(json.loads(cluster.command(*arguments, "--json").stdout))


def refused(environ: dict[str, str], *arguments: str, **options: object) -> str:
    """The one line on standard error of a start that fails."""
    command = [str(Path(sys.executable).with_name("expertmesh")), "serve", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return str(line)


def test_what_cannot_work_is_refused_by_name(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Before anything starts, within the time that a test may take, and with what to do."""
    environ = private_environ(tmp_path / "run")
    model = str(tiny_checkpoint)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        began = time.monotonic()
        line = refused(environ | {"RAY_ADDRESS": gone}, model, "--trusted-network")
        assert f"no Ray at {gone}: Connection refused; unset RAY_ADDRESS" in line
        if not any(process.name() == "gcs_server" for process in psutil.process_iter()):  # it might be somebody's
            line = refused(environ | {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)}, model, "--trusted-network")
            assert "ray_address: `auto`, but Could not find any running Ray instance" in line
        assert time.monotonic() - began < 60  # was eight minutes

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    assert "only 1024 files may be open at once" in refused(environ, model, preexec_fn=few_files)
    (tmp_path / "file").touch()
    assert "state_dir: " in refused(environ, model, "--state-dir", str(tmp_path / "file" / "x"))
    assert not list((tmp_path / "run").rglob("*.json"))


def test_a_start_of_ray_that_fails_says_the_cause_and_leaves_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Ray itself says only that a core worker has been shut down."""
    state = tmp_path / "state"
    before = set(Path("/tmp").glob("em-*"))
    environ = private_environ(tmp_path / "run") | {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": "/nonexistent"}
    line = refused(environ, str(tiny_checkpoint), "--state-dir", str(state))
    assert "cannot start Ray: " in line
    (logs,) = (state / "expertmesh" / "logs").iterdir()
    assert line.endswith(f"(logs: {logs})")
    assert any(logs.iterdir())
    assert set(Path("/tmp").glob("em-*")) <= before


def test_few_files_are_enough_for_fewer_clients(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A hard limit of 4,096 was a page of HAProxy's words after Ray had started. Kubernetes' variables do not hurt."""
    limit = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))"
    code = f"{limit}; os.execv(sys.argv[1], sys.argv[1:])"
    port = free_port()
    log = tmp_path / "log"
    script = str(Path(sys.executable).with_name("expertmesh"))
    arguments = ["serve", str(tiny_checkpoint), "--transport", "local", "--kv-cache-mb", "16", "--port", str(port)]
    environ = private_environ(tmp_path / "run") | {"EXPERTMESH_PORT": "tcp://10.96.0.12:8000"}
    command = [sys.executable, "-c", code, script, *arguments]
    with log.open("w") as file:
        process = psutil.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT)
    cluster = RunningCluster(process, f"http://127.0.0.1:{port}", port, tiny_checkpoint.name, log, environ)
    try:
        wait_until(lambda: "ready in" in log.read_text() or process.poll() is not None, 120)
        assert chat(cluster, "hello", max_tokens=2), log.read_text()
        assert "note: EXPERTMESH_PORT=tcp://10.96.0.12:8000 is ignored" in log.read_text()
        with suppress(psutil.NoSuchProcess):
            haproxy = next(process for process in cluster.family() if process.name() == "haproxy")
            assert haproxy.num_fds() < 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert run("status", environ=environ).returncode == 1
