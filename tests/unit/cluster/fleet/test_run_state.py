"""Catches `status` and `stop` that find a dead cluster, a stranger's process, or the wrong one of two."""

import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.control.view import Member, View
from cluster.errors import ExpertMeshError, StartError
from cluster.fleet import operator_cli, snapshot
from cluster.fleet.run_state import RunDirectory, RunState, find, since_boot
from cluster.placement.placement import striped
from cluster.state_dir import VARIABLE

NOEXEC = SimpleNamespace(f_flag=os.ST_NOEXEC)  # of `os.statvfs`


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunState:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    process = psutil.Process()
    url = "http://127.0.0.1:8000"
    return RunState(process.pid, since_boot(process), url, 8000, "", str(tmp_path), "tiny", "grpc", "as configured")


def test_found_while_it_lives(mine: RunState) -> None:
    mine.write()
    assert find() == mine
    assert find(8000) == mine
    mine.remove()
    with pytest.raises(ExpertMeshError, match="no cluster of this user is running"):
        find()


def test_a_recycled_pid_is_not_taken_for_it(mine: RunState) -> None:
    replace(mine, started=mine.started - 1000).write()
    with pytest.raises(ExpertMeshError, match="no cluster"):
        find()


def test_it_is_found_when_the_clock_was_set(mine: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells the time of day of the boot by the clock of now, and so every process seems to be another."""
    mine.write()
    for owner, name in ((psutil, "boot_time"), (psutil.Process, "create_time")):
        true = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, true=true: true(*given) + 3600)
    assert find() == mine


def test_two_clusters_need_a_port(mine: RunState) -> None:
    mine.write()
    other = replace(mine, port=8001)
    other.write()
    with pytest.raises(ExpertMeshError, match="one of 8000, 8001"):
        find()
    assert find(8001) == other
    with pytest.raises(ExpertMeshError, match="on port 9"):
        find(9)


def test_a_damaged_note_is_no_cluster(mine: RunState, tmp_path: Path) -> None:
    mine.write()
    (tmp_path / "expertmesh" / "8000.json").write_text('{"pid": 1')
    with pytest.raises(ExpertMeshError, match="no cluster"):
        find()


def test_nowhere_to_leave_the_note_is_one_clear_error(mine: RunState, tmp_path: Path) -> None:
    (tmp_path / "expertmesh").write_text("a file where the directory should be")
    with pytest.raises(StartError, match="--state-dir"):
        mine.write()
    mine.remove()


def test_a_directory_that_is_gone_or_full_costs_the_snapshot_and_not_the_cluster(mine: RunState) -> None:
    view = View(1, (), striped(1, 1, ("expert-0",)))
    state = replace(mine, run_dir=f"{mine.run_dir}/gone")
    state.write()
    snapshot.write(state, view)
    with pytest.raises(ExpertMeshError, match="/gone was removed"):
        snapshot.read()


def test_a_full_disk_hides_the_state_and_not_the_way_to_the_controller(
    mine: RunState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Would catch an operator who can ask for nothing any more because a snapshot cannot be renewed."""
    mine.write()
    (tmp_path / "admin_token").write_text("secret")
    controller = Member("controller", "controller", 1, "n", "ready", "127.0.0.1:7")
    snapshot.write(mine, View(1, (controller,), striped(1, 1, ["expert-0"])))
    written = time.time()
    monkeypatch.setattr(snapshot, "time", SimpleNamespace(time=lambda: written + 60))
    with pytest.raises(ExpertMeshError, match=r"has said nothing for 15 s$"):
        snapshot.read()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0))
    with pytest.raises(ExpertMeshError, match=r"disk of .* is full"):
        snapshot.read()
    assert operator_cli._admin(None) == ("http://127.0.0.1:7", "secret")


def test_the_run_directory_is_private_and_short_enough_for_sockets() -> None:
    run = RunDirectory.make()
    try:
        assert run.path.stat().st_mode & 0o077 == 0
        assert len(str(run.path)) < 30
    finally:
        run.remove()
    assert not run.path.exists()


def test_what_tidies_temporary_directories_finds_it_in_use() -> None:
    """systemd-tmpfiles leaves a directory alone while somebody holds a lock on it."""
    run = RunDirectory.make()
    directory = os.open(run.path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(directory)
        run.remove()


def test_what_was_removed_is_named() -> None:
    run = RunDirectory.make()
    (run.path / "haproxy").touch()
    assert run.missing("haproxy") is None
    assert run.missing("haproxy", "admin") == run.path / "admin"
    (run.path / "haproxy").unlink()
    run.path.rmdir()
    assert run.missing() == run.path
    run.remove()


def test_a_long_temporary_directory_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets have at most 107 characters of path."""
    long = tmp_path / ("a" * 30)
    long.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    run = RunDirectory.make()
    assert run.path.parent != long
    run.remove()


def test_a_directory_from_which_nothing_may_be_started_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary directory that is mounted `noexec`, as hardened systems have it: HAProxy could not be started."""
    real, closed = os.statvfs, {"/tmp"}
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr(os, "statvfs", lambda path: NOEXEC if path in closed else real(path))
    monkeypatch.setenv(VARIABLE, "/var/tmp")
    run = RunDirectory.make()
    assert run.path.parent != Path("/tmp")
    run.remove()
    monkeypatch.setattr(os, "statvfs", lambda path: NOEXEC)
    with pytest.raises(StartError, match=r"no program may be started from there.*set TMPDIR"):
        RunDirectory.make()
