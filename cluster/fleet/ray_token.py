"""Ray's authentication token: who has none gets one, readable by the user alone."""

from __future__ import annotations

import os
import secrets
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from cluster.errors import StartError
from cluster.state_dir import cache_home


def has_token(environ: MutableMapping[str, str]) -> bool:
    """Whether Ray finds a token where it looks for one."""
    if environ.get("RAY_AUTH_TOKEN"):
        return True
    path = _path(environ)
    return path is not None and _holds_one(path)


def ensure_token(environ: MutableMapping[str, str]) -> None:
    """Put a token where Ray looks for one, unless it has one or authentication is off.

    Where that place cannot be written the token goes to the cache directory, and `environ` says so. StartError.
    """
    if environ.get("RAY_AUTH_MODE") != "token" or has_token(environ):
        return
    path = _path(environ)
    try:
        if path is not None:
            _write(path)
            return
    except OSError as error:
        if "RAY_AUTH_TOKEN_PATH" in environ:
            raise StartError(
                f"cannot write Ray's token to {path} (RAY_AUTH_TOKEN_PATH): {error.strerror}; give --state-dir"
            ) from error
    path = (cache_home(environ) or Path("/nonexistent")) / "expertmesh" / "ray_token"
    try:
        if not _holds_one(path):
            _write(path)
    except OSError as error:
        raise StartError(f"cannot write Ray's token to {path}: {error.strerror}; give --state-dir") from error
    environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _path(environ: MutableMapping[str, str]) -> Path | None:
    if named := environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(named)
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:  # a user without a home
        return None


def _holds_one(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _write(path: Path) -> None:
    """A whole token or nothing: Ray refuses a file that a full disk left empty, and would do so for ever."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        if path.is_file() and not _holds_one(path):
            path.unlink(missing_ok=True)
        with suppress(FileExistsError):  # another process was faster
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
