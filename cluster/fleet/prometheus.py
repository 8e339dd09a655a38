"""A Prometheus for one cluster, where one is installed: it scrapes every process and ends with `serve`."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import yaml

from cluster.errors import StartError
from cluster.fleet.ports import free_port
from cluster.fleet.targets import NAME as TARGETS

PORT = 9090  # its own default; another one where that is taken
_COMMAND = "prometheus"
_HINT = "on Debian and Ubuntu: apt install prometheus; else https://prometheus.io/download"
_START_S = 30.0
_POLL_S = 0.1
_STOP_S = 5.0
_SCRAPE_S = 5
_PR_SET_PDEATHSIG = 1
# In a clone; a wheel has the package alone.
_RULES = tuple(Path(__file__).parents[2] / "deploy" / "prometheus" / name for name in ("rules.yml", "alerts.yml"))


def check_installed() -> None:
    """StartError, saying what to do, where there is no Prometheus."""
    if shutil.which(_COMMAND) is None:
        raise StartError(f"--prometheus: there is no program `{_COMMAND}` ({_HINT})")


class Prometheus:
    """Runs in `run_dir`, which has its configuration, its data and its log; listens on loopback alone."""

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / "prometheus"
        self._targets = run_dir / TARGETS
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, check: Callable[[], None]) -> None:
        """Returns once it is ready; `check` is called meanwhile and may raise. StartError."""
        check_installed()
        self._directory.mkdir()
        (self._directory / "prometheus.yml").write_text(yaml.safe_dump(self._config()), encoding="utf-8")
        port = free_port("127.0.0.1", PORT)
        self.url = f"http://127.0.0.1:{port}"
        command = [
            _COMMAND,
            f"--config.file={self._directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
            )
        deadline = time.monotonic() + _START_S
        while not self._is_ready():
            check()
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise StartError(f"--prometheus: it does not start: {self._last_words()}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it. May be repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _config(self) -> dict[str, object]:
        return {
            "global": {"scrape_interval": f"{_SCRAPE_S}s", "evaluation_interval": f"{_SCRAPE_S}s"},
            "rule_files": [str(path) for path in _RULES if path.exists()],
            "scrape_configs": [
                {
                    "job_name": "expertmesh",
                    "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": f"{_SCRAPE_S}s"}],
                }
            ],
        }

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=2.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _last_words(self) -> str:
        lines = (self._directory / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "it says nothing"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
