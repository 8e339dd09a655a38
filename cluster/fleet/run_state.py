"""What a running cluster leaves on disk: a private directory while it lives, and a note where to find it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import ConfigError, ExpertMeshError, StartError
from cluster.state_dir import VARIABLE, cache_home

# Ray and HAProxy put Unix sockets below the run directory, whose paths may have 107 bytes.
_LONGEST_TMP = 20
_TOKEN = "admin_token"
_SAME_S = 0.1  # the kernel counts a process's start in hundredths


@dataclass(frozen=True, slots=True)
class RunState:
    """The note that `status` and `stop` read."""

    pid: int  # of `expertmesh serve`
    started: float  # `since_boot` of that process, so that a recycled pid is not taken for it
    url: str
    port: int
    ray_address: str  # empty until Ray runs
    run_dir: str
    model: str
    transport: str
    transport_reason: str
    cluster: str = ""  # its name, in the labels of its metrics

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # A zombie has ended; whoever started it has not asked yet.
            return process.status() != psutil.STATUS_ZOMBIE and abs(since_boot(process) - self.started) < _SAME_S
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
            raise StartError(f"cannot write {path}: {error.strerror}; give --state-dir") from error

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            _path(self.port).unlink(missing_ok=True)


def since_boot(process: psutil.Process) -> float:
    """Seconds from the machine's boot to the start of `process`: the time of day at which it started is another one
    when the clock is set, this is not."""
    return process.create_time() - psutil.boot_time()


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A directory of a running cluster that only this user can enter, for sockets and logs."""

    path: Path
    _lock: int  # what cleans temporary directories (systemd-tmpfiles) leaves alone what somebody holds a lock on

    @classmethod
    def make(cls) -> RunDirectory:
        """A new one. Raises StartError when there can be none."""
        reason = f"no path of at most {_LONGEST_TMP} characters"
        for base in _bases():
            try:
                if os.statvfs(base).f_flag & os.ST_NOEXEC:  # what HAProxy is started by lies there
                    reason = f"{base}: no program may be started from there"
                    continue
                path = tempfile.mkdtemp(prefix="em-", dir=base)
                lock = os.open(path, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(Path(path), lock)
            except OSError as error:
                reason = f"{base}: {error.strerror}"
        raise StartError(
            f"no directory for sockets ({reason}); set TMPDIR to a short path, not `noexec`, that you can write"
        )

    def missing(self, *names: str) -> Path | None:
        """The first of itself and of `names` within it that somebody removed; None while all are there."""
        return next((path for path in (self.path, *(self.path / name for name in names)) if not path.exists()), None)

    def remove(self) -> None:
        """Remove it and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _bases() -> Iterator[str]:
    """Where a run directory may lie, best first."""
    with contextlib.suppress(FileNotFoundError):
        yield from (base for base in (tempfile.gettempdir(),) if len(base) <= _LONGEST_TMP)
    places = ("/tmp", os.environ.get(VARIABLE, ""), str(cache_home() or ""), "/dev/shm")
    yield from (base for base in places if base and len(base) <= _LONGEST_TMP)


def credentials_path(run_dir: Path) -> Path:
    """The file with which tools of this user join the cluster's calls."""
    return run_dir / "credentials.json"


def make_admin_token(run_dir: Path, given: Path | None = None) -> str:
    """The token for the admin API, kept where only this user reads it: that in the file `given`, or a new one."""
    token = new_token() if given is None else read_token(given)
    with open(os.open(run_dir / _TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(token)
    return token


def new_token() -> str:
    """One that nobody guesses."""
    return secrets.token_urlsafe(32)


def read_token(file: Path) -> str:
    """The token in a file. ConfigError when there is none."""
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the admin token in {file} cannot be read: {error}") from error
    if not token:
        raise ConfigError(f"{file} holds no admin token")
    return token


def admin_token(run_dir: Path) -> str:
    """The token of the cluster in `run_dir`. ExpertMeshError when it is not there."""
    try:
        return (run_dir / _TOKEN).read_text(encoding="ascii")
    except OSError as error:
        raise ExpertMeshError(f"cannot read the admin token: {error}") from error


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
    return Path(cache_home() or tempfile.gettempdir(), "expertmesh", "run")


def _path(port: int) -> Path:
    return _directory() / f"{port}.json"
