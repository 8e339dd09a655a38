"""A real cluster for tests: `expertmesh serve` as a process of its own. Ray allows one at a time to be tested well."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.waiting import wait_until
from workers.kernels.cpu.library import object_file

START_TIMEOUT_S = 180.0
_SCRIPT = Path(sys.executable).with_name("expertmesh")
#: The command; of a checkout that is not installed, by the interpreter.
EXPERTMESH = (str(_SCRIPT),) if _SCRIPT.exists() else (sys.executable, "-c", "from cluster.cli import app; app()")
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@dataclass(frozen=True)
class RunningCluster:
    """One `expertmesh serve` that is ready."""

    process: psutil.Popen
    url: str
    port: int
    model: str
    log: Path
    environ: dict[str, str]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `expertmesh ARGUMENTS` in the environment of the cluster."""
        return run(*arguments, environ=self.environ)

    def status(self) -> dict[str, Any]:
        result = self.command("status", "--json")
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    def process_of(self, member: str) -> dict[str, Any]:
        return next(process for process in self.status()["processes"] if process["id"] == member)

    def look(self) -> dict[str, Any]:
        """The file that `expertmesh status` shows. For waiting: a process for each look would take a core from it."""
        note = Path(self.environ["XDG_RUNTIME_DIR"], "expertmesh", f"{self.port}.json")
        return dict(json.loads(Path(json.loads(note.read_text())["run_dir"], "status.json").read_text()))

    def members(self, role: str) -> dict[str, dict[str, Any]]:
        """The processes of a role at this moment, by id."""
        return {process["id"]: process for process in self.look()["processes"] if process["role"] == role}

    def ready(self) -> bool:
        return all(process["state"] == "ready" for process in self.look()["processes"])

    def family(self) -> list[psutil.Process]:
        """Every process that `serve` brought to life, itself included."""
        return [self.process, *self.process.children(recursive=True)]

    def kill(self, member: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """kill -9 one process; the same member once it and all others are ready again."""
        before = self.process_of(member)
        os.kill(before["pid"], signal.SIGKILL)

        def is_back() -> bool:
            pids = {process["id"]: process["pid"] for process in self.look()["processes"]}
            return pids.get(member, before["pid"]) != before["pid"] and self.ready()

        wait_until(is_back, timeout_s)
        return self.process_of(member)


def run(
    *arguments: str, environ: dict[str, str] | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """`expertmesh ARGUMENTS` to its end."""
    command = [*EXPERTMESH, *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False)


def free_port() -> int:
    """A port that nobody uses, below the range from which the system gives ports to connections, and above the one that
    Ray keeps for its workers."""
    while True:
        port = random.randrange(20_000, 28_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def lend_kernels(cache: Path) -> None:
    """Put the CPU kernels of this environment into an empty cache: building them takes half a minute."""
    kernels = cache / "expertmesh" / "kernels"
    kernels.mkdir(parents=True)
    shutil.copy(object_file(), kernels)


def private_environ(directory: Path) -> dict[str, str]:
    """An environment whose running clusters nobody else sees."""
    directory.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EXPERTMESH_", "RAY_"))}
    return {**clean, "XDG_RUNTIME_DIR": str(directory)}


@contextmanager
def starting_cluster(directory: Path, model: str | Path, *options: str) -> Iterator[RunningCluster]:
    """`expertmesh serve MODEL OPTIONS` on a free port, until the end of the block. `directory` takes its log."""
    port = free_port()
    environ = private_environ(directory / "run")
    log = directory / "serve.log"
    command = [*EXPERTMESH, "serve", str(model), "--port", str(port), *options]
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
    cluster = RunningCluster(process, f"http://127.0.0.1:{port}", port, Path(model).name, log, environ)
    try:
        yield cluster
    finally:
        if process.poll() is None:
            family = cluster.family()
            process.terminate()
            psutil.wait_procs(family, timeout=60)
            for left in alive(family):
                left.kill()


@contextmanager
def running_cluster(directory: Path, model: str | Path, *options: str) -> Iterator[RunningCluster]:
    """The same, once it is ready."""
    with starting_cluster(directory, model, *options) as cluster:

        def started() -> bool:
            assert cluster.process.poll() is None, cluster.log.read_text()
            return "ready in" in cluster.log.read_text()

        wait_until(started, START_TIMEOUT_S)
        yield cluster


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run, after they had five seconds to end."""
    return [process for process in psutil.wait_procs(family, timeout=5)[1] if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 0.3 million parameters with a real tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    result = run("model", "random", str(path))
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[RunningCluster]:
    """Two routers, two expert workers and a gateway, started once per module."""
    with running_cluster(
        tmp_path_factory.mktemp("cluster"), tiny_checkpoint, "--routers", "2", "--kv-cache-mb", "16"
    ) as running:
        yield running


def chat(cluster: RunningCluster, prompt: str, **fields: Any) -> str:
    """The text of one greedy chat answer."""
    body = {"model": cluster.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, **fields}
    response = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def listeners(family: list[psutil.Process]) -> set[tuple[str, int]]:
    found = set()
    for process in family:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add((connection.laddr.ip, connection.laddr.port))
    return found


def stream(cluster: RunningCluster, tokens: int, texts: list[str]) -> None:
    """Append the chunks of one greedy completion to `texts`."""
    body = {"model": cluster.model, "prompt": "once", "max_tokens": tokens, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        texts.extend(line for line in response.iter_lines() if line.startswith("data: "))


def text(events: list[str]) -> str:
    """What a streamed completion says, however it was cut into events."""
    chunks = (json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]")
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
