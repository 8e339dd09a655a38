"""Would catch a start that fails because Ray's token has no place, and a token that others can read."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cluster.errors import StartError
from cluster.fleet.ray_token import ensure_token, has_token


def test_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"RAY_AUTH_MODE": "token"}
    assert not has_token(environ)
    ensure_token(environ)
    token = tmp_path / ".ray" / "auth_token"
    assert has_token(environ) and token.stat().st_mode & 0o777 == 0o600
    written = token.read_text()
    ensure_token(environ)
    assert token.read_text() == written
    assert environ == {"RAY_AUTH_MODE": "token"}


def test_a_home_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environ = {"RAY_AUTH_MODE": "token", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ensure_token(environ)
    path = Path(environ["RAY_AUTH_TOKEN_PATH"])
    assert path == tmp_path / "cache" / "expertmesh" / "ray_token"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_place_that_was_named_is_used_or_refused(tmp_path: Path) -> None:
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "new" / "token")}
    ensure_token(environ)
    assert (tmp_path / "new" / "token").is_file()
    environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "new" / "token" / "x")
    with pytest.raises(StartError, match="RAY_AUTH_TOKEN_PATH"):
        ensure_token(environ)


def test_a_full_disk_leaves_no_empty_token_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses an empty one: no later start would succeed either."""
    token = tmp_path / "token"
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def full(n_bytes: int) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("secrets.token_hex", full)
        with pytest.raises(StartError, match="No space left on device; give --state-dir"):
            ensure_token(environ)
    assert not list(tmp_path.iterdir())
    token.touch()
    assert not has_token(environ)
    ensure_token(environ)
    assert has_token(environ) and list(tmp_path.iterdir()) == [token]


@pytest.mark.parametrize(
    "environ", [{}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"}]
)
def test_nothing_is_written_where_nothing_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_token(environ)
    assert not list(tmp_path.iterdir())
