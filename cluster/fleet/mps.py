"""NVIDIA's multi-process service, for processes that share a GPU: without it they take turns of milliseconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from workers.device import ENVIRONMENT

_COMMAND = "nvidia-cuda-mps-control"
_LIMIT_S = 10.0


class Mps:
    """A service of our own, which only processes with `variables` in their environment use."""

    def __init__(self, run_dir: Path) -> None:
        pipes, logs = run_dir / "mps", run_dir / "mps-log"
        self.variables = {
            "CUDA_MPS_PIPE_DIRECTORY": str(pipes),
            "CUDA_MPS_LOG_DIRECTORY": str(logs),
        }
        self._runs = False

    def start(self) -> str:
        """Start it before any of its processes; what kept it from that, or nothing."""
        if shutil.which(_COMMAND) is None:
            return f"{_COMMAND} is not installed"
        for directory in self.variables.values():
            os.makedirs(directory, exist_ok=True)
        try:
            done = subprocess.run([_COMMAND, "-d"], env=self._environment, capture_output=True, timeout=_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        self._runs = done.returncode == 0
        return "" if self._runs else done.stderr.decode(errors="replace").strip() or f"{_COMMAND} failed"

    def stop(self) -> None:
        """End it after the last of its processes."""
        if self._runs:
            self._runs = False
            try:
                subprocess.run(
                    [_COMMAND], input=b"quit\n", env=self._environment, timeout=_LIMIT_S, capture_output=True
                )
            except (OSError, subprocess.TimeoutExpired):
                return  # it ends with the machine, and serves nobody

    @property
    def _environment(self) -> dict[str, str]:
        # A service that is shown some of the GPUs numbers them anew, and its processes would not find theirs.
        seen = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        return seen | ENVIRONMENT | self.variables
