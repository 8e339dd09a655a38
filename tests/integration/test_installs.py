"""`expertmesh serve` installed as people install it, in the environments that they really have: from a wheel, in a path
with a space, as whoever a container makes them, without a network, beside folders with our names. Would catch a start
that fails there, or leaves something behind. Empty environments of every Python are scripts/install_check.py's."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.cluster_fixture import RunningCluster, alive, chat, free_port, lend_kernels, private_environ
from tests.waiting import wait_until

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
    lend_dependencies(next((directory / "lib").glob("python*")) / "site-packages")
    return directory / "bin" / "expertmesh"


def lend_dependencies(packages: Path) -> None:
    """Let an environment find what the environment of the tests has, this package excepted."""
    ours = [path for path in sys.path if path.endswith("site-packages") and not (Path(path) / "cluster").is_dir()]
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n")


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


@contextmanager
def served(
    command: Sequence[str | Path], model: Path, log: Path, environ: Mapping[str, str], **options: object
) -> Iterator[RunningCluster]:
    """`COMMAND serve MODEL`, ready, and ended by Ctrl-C as a terminal sends it, to every process of the group: with
    code 0, a last word, and no process left."""
    port = free_port()
    words = [*map(str, command), "serve", str(model), "--port", str(port), "--kv-cache-mb", "16"]
    with log.open("w") as file:
        process = psutil.Popen(
            words, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    cluster = RunningCluster(process, f"http://127.0.0.1:{port}", port, model.name, log, dict(environ))
    try:
        wait_until(lambda: "ready in" in log.read_text() or process.poll() is not None, 240)
        assert process.poll() is None, log.read_text()
        yield cluster
        family = cluster.family()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
        assert log.read_text().rstrip().endswith("stopped")
        assert "Traceback" not in log.read_text()
        assert not alive(family)
    finally:
        for left in alive(cluster.family()) if process.is_running() else []:
            left.kill()


# A container without a network, whose only file system that can be written is a volume at /var/tmp.
CONTAINER = """
ip link set lo up
for which in all default; do echo 1 > /proc/sys/net/ipv6/conf/$which/disable_ipv6; done
mount --bind "$1" /var/tmp
mount -o remount,bind,ro /
shift
exec "$@"
"""

# Answers can be had from within alone.
ASK = """
import json, sys, urllib.request
body = {"model": sys.argv[2], "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
headers = {"content-type": "application/json"}
request = urllib.request.Request(f"{sys.argv[1]}/v1/chat/completions", json.dumps(body).encode(), headers)
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


def containers_can_be_made() -> bool:
    tools = all(map(shutil.which, ("setpriv", "unshare", "nsenter", "ip", "mount")))
    return tools and os.getuid() == 0 and subprocess.run(["unshare", "-mn", "true"], check=False).returncode == 0


@pytest.mark.skipif(not containers_can_be_made(), reason="only root can become another user in a container")
def test_as_whoever_a_container_makes_us(
    expertmesh: Path, reachable: Callable[[Path], None], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """No entry in the user database, `HOME=/`, nothing inherited, umask 077, a read-only root, no IPv6, no network,
    folders with our names around; it starts, answers, is found by `status`, and leaves only its private state."""
    here, volume = tmp_path / "here", tmp_path / "volume"
    for name in ("cluster", "workers"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise SystemExit('imported from the current directory')")
    (here / "ray.py").write_text("raise SystemExit('imported from the current directory')")
    volume.mkdir()
    for path in (here, expertmesh.parent, tiny_checkpoint):
        reachable(path)
    reachable(volume)
    volume.chmod(0o1777)
    # To read is all that is left of root, since the interpreter may lie in root's home.
    capabilities = "-all,+dac_read_search"
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
              f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]  # fmt: skip
    environ = {"PATH": os.environ["PATH"], "HOME": "/"}
    command = ["unshare", "-mn", "sh", "-ec", CONTAINER, "sh", volume, *become, expertmesh]
    with served(command, tiny_checkpoint, tmp_path / "log", environ, cwd=here, umask=0o077) as cluster:
        inside = ["nsenter", f"--target={cluster.process.pid}", "--mount", "--net", *become]

        def run(*command: str | Path) -> str:
            done = subprocess.run([*inside, *command], cwd=here, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert run(sys.executable, "-P", "-c", ASK, cluster.url, cluster.model)
        assert "router-0" in run(expertmesh, "status")
    state = volume / f"expertmesh-{NOBODY}"
    assert state.stat().st_mode & 0o777 == 0o700
    assert list(volume.iterdir()) == [state]


def test_installed_for_one_user_with_few_files(wheel: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`pip install --user`: what is started finds the packages too. A hard limit of 4,096 descriptors, which was a page
    of HAProxy's words after Ray had started, means fewer clients. Kubernetes' variables do not hurt."""
    python = Path(sys.base_exec_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    environ = private_environ(tmp_path / "run") | {"HOME": str(tmp_path), "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    environ.pop("XDG_CACHE_HOME", None)
    pip = [python, "-m", "pip", "install", "--user", "--quiet", "--no-deps", "--no-index", wheel]
    installed = subprocess.run(pip, env=environ, capture_output=True, text=True, check=False)
    if "No module named pip" in installed.stderr:
        pytest.skip(f"{python} has no pip")
    assert installed.returncode == 0, installed.stderr
    packages = subprocess.run([python, "-m", "site", "--user-site"], env=environ, capture_output=True, text=True)
    lend_dependencies(Path(packages.stdout.strip()))
    lend_kernels(tmp_path / ".cache")
    command = [tmp_path / ".local" / "bin" / "expertmesh"]
    environ |= {"EXPERTMESH_PORT": "tcp://10.96.0.12:8000"}
    with served(command, tiny_checkpoint, tmp_path / "log", environ, preexec_fn=few_files) as cluster:
        assert chat(cluster, "hello", max_tokens=2)
        assert "note: EXPERTMESH_PORT=tcp://10.96.0.12:8000 is ignored" in cluster.log.read_text()
        haproxy = next(process for process in cluster.family() if process.name() == "haproxy")
        assert haproxy.num_fds() < 200


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
