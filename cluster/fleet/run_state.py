"""What a running cluster leaves on disk: a private directory while it lives, and a note where to find it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import ExpertMeshError, StartError

# Ray and HAProxy put Unix sockets below the run directory, whose paths may have 107 bytes.
_LONGEST_TMP = 20


@dataclass(frozen=True, slots=True)
class RunState:
    """The note that `status` and `stop` read."""

    pid: int  # of `expertmesh serve`
    started: float  # creation time of that process, so that a recycled pid is not taken for it
    url: str
    port: int
    ray_address: str  # empty until Ray runs
    run_dir: str
    model: str
    transport: str
    transport_reason: str

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # A zombie has ended; whoever started it has not asked yet.
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return False

    def write(self) -> None:
        """Replace the note of this port. Raises StartError when that is impossible."""
        path = _path(self.port)
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            raise StartError(
                f"cannot write {path}: {error.strerror}; set XDG_RUNTIME_DIR to a directory of yours"
            ) from error

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            _path(self.port).unlink(missing_ok=True)


def credentials_path(run_dir: Path) -> Path:
    """The file with which tools of this user join the cluster's calls."""
    return run_dir / "credentials.json"


def make_run_dir() -> Path:
    """A new directory that only this user can enter. Raises StartError when there can be none."""
    try:
        base = tempfile.gettempdir()
        return Path(tempfile.mkdtemp(prefix="em-", dir=base if len(base) <= _LONGEST_TMP else "/tmp"))
    except OSError as error:
        raise StartError(f"cannot make a temporary directory: {error}; TMPDIR says where") from error


def find(port: int | None = None) -> RunState:
    """The running cluster of this user, on `port` if there are several. ExpertMeshError when there is none."""
    states = [state for path in sorted(_directory().glob("*.json")) if (state := _read(path)) is not None]
    alive = [state for state in states if state.alive and port in (None, state.port)]
    if not alive:
        where = "" if port is None else f" on port {port}"
        raise ExpertMeshError(f"no cluster of this user is running{where}; `expertmesh serve` starts one")
    if len(alive) > 1:
        ports = ", ".join(str(state.port) for state in alive)
        raise ExpertMeshError(f"several clusters are running: say which one with --port (one of {ports})")
    return alive[0]


def _read(path: Path) -> RunState | None:
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # half written by a machine that went down, or of another version
        return None


def _directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime, "expertmesh")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "expertmesh", "run")


def _path(port: int) -> Path:
    return _directory() / f"{port}.json"
