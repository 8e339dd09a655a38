"""Would catch state that goes to where nobody can write, or to a directory that somebody else prepared."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from cluster.errors import ConfigError, StartError
from cluster.state_dir import VARIABLE, settle

ALL = ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR", VARIABLE)


def unwritable(tmp_path: Path) -> str:
    """A place in which not even root can make anything."""
    (tmp_path / "file").touch(exist_ok=True)
    return str(tmp_path / "file" / "home")


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path / "not" / "there" / "yet")}
    assert settle(environ) is None
    assert environ == {"XDG_CACHE_HOME": str(tmp_path / "not" / "there" / "yet")}


def test_what_the_specification_says_to_ignore_is_ignored(tmp_path: Path) -> None:
    """Relative to which directory? Each process of a cluster has another."""
    environ = {"XDG_CACHE_HOME": "cache", "XDG_RUNTIME_DIR": "run", "HOME": str(tmp_path)}
    settle(environ)
    assert not {"cache", "run"} & set(environ.values())


def test_one_directory_holds_all_when_one_is_named(tmp_path: Path) -> None:
    named, given = tmp_path / "named", tmp_path / "given"
    environ = {VARIABLE: str(named), "RAY_AUTH_TOKEN_PATH": "/elsewhere", "XDG_RUNTIME_DIR": "/run/user/0"}
    assert settle(environ) == named
    assert {environ[name] for name in ALL} == {str(named)}
    assert environ["RAY_AUTH_TOKEN_PATH"] == str(named / "ray_token")
    assert settle(environ, given) == given  # the command line over the environment, also after it
    assert {environ[name] for name in ALL} == {str(given)}
    assert environ["RAY_AUTH_TOKEN_PATH"] == str(given / "ray_token")
    assert given.stat().st_mode & 0o777 == 0o700


def test_a_private_temporary_directory_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {"XDG_CACHE_HOME": unwritable(tmp_path)}
    directory = settle(environ)
    assert directory == tmp_path / f"expertmesh-{os.getuid()}"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {environ[name] for name in ALL} == {str(directory)}
    assert settle({"XDG_CACHE_HOME": unwritable(tmp_path)}) == directory


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"expertmesh-{os.getuid()}").mkdir()
    (tmp_path / f"expertmesh-{os.getuid()}").chmod(0o777)
    with pytest.raises(StartError, match="--state-dir"):
        settle({"XDG_CACHE_HOME": unwritable(tmp_path)})
    (tmp_path / f"expertmesh-{os.getuid()}").rmdir()
    (tmp_path / f"expertmesh-{os.getuid()}").symlink_to("/tmp")
    with pytest.raises(StartError, match="--state-dir"):
        settle({"XDG_CACHE_HOME": unwritable(tmp_path)})


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"state_dir: .*file/home"):
        settle({}, Path(unwritable(tmp_path)))


def test_a_user_without_an_entry_gets_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 1_000_770_000)
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    settle(environ)
    assert environ["USER"] == "user-1000770000"


def test_a_directory_without_room_is_refused(tmp_path: Path) -> None:
    """A file without bytes can be made on a full disk too. What stands for it: no file may grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(ConfigError, match="name a directory that you can write"):
            settle({}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
