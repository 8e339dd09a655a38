"""Where files that outlive a process go: one directory that this user can write, whatever account and machine it is."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from cluster.errors import ConfigError, StartError

VARIABLE = "EXPERTMESH_STATE_DIR"
_PROBE_BYTES = 16384  # a file without any can be made on a full disk


def settle(environ: MutableMapping[str, str], given: Path | None = None) -> Path | None:
    """See to it that all that keeps files finds a place: change `environ` accordingly, before anything reads it.

    `given`, else what EXPERTMESH_STATE_DIR names, holds everything. Without either things stay where the system has
    them (`$XDG_CACHE_HOME` or `~/.cache`, `$XDG_RUNTIME_DIR`, `~/.ray`) if that can be written; if not, as in a
    container under an arbitrary user, everything goes to a private directory below the temporary one. Returns the
    directory that holds everything, None where things stay. Raises ConfigError, StartError.
    """
    _name_the_user(environ)
    for variable in ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        if not os.path.isabs(environ.get(variable) or "/"):  # to be ignored, says the specification
            del environ[variable]
    if given is None and environ.get(VARIABLE):
        given = Path(environ[VARIABLE])
    if given is not None:
        directory = _made(given.expanduser())
    elif (cache := cache_home(environ)) is not None and _can_be_made(cache):
        return None
    else:
        directory = _temporary()
    environ[VARIABLE] = environ["XDG_CACHE_HOME"] = environ["XDG_RUNTIME_DIR"] = str(directory)
    environ["RAY_AUTH_TOKEN_PATH"] = str(directory / "ray_token")
    environ.setdefault("TRITON_CACHE_DIR", str(directory / "triton"))
    return directory


def cache_home(environ: MutableMapping[str, str] | os._Environ[str] = os.environ) -> Path | None:
    """Where the XDG specification puts caches; None for a user without a home."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME, no entry in the user database
        return None


def _name_the_user(environ: MutableMapping[str, str]) -> None:
    """Libraries ask for the user's name, and fail where neither the environment nor the user database has one."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        environ.setdefault("USER", f"user-{os.getuid()}")


def _made(directory: Path) -> Path:
    directory = directory.absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            return directory
    except OSError as error:
        raise ConfigError(f"state_dir: {directory}: {error.strerror}; name a directory that you can write") from error


def _can_be_made(directory: Path) -> bool:
    """Whether `directory` can be written, or made."""
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    try:
        directory = Path(tempfile.gettempdir(), f"expertmesh-{os.getuid()}")
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise StartError(
            f"nowhere to keep state: neither the home nor a temporary directory can be written ({error.strerror}); "
            f"give --state-dir, or {VARIABLE}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StartError(f"{directory} is somebody else's, or others can write it; give --state-dir, or {VARIABLE}")
    return directory
