"""Would catch a start that fails for a port that nobody named, for too few files, or without a cause."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.fleet import ray_logs
from cluster.fleet.open_files import most_clients
from cluster.fleet.ports import reserve_port


def test_nobody_else_gets_a_reserved_port() -> None:
    """Neither who names it nor who takes any; a server that shares it does, and gets every connection."""
    port = reserve_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        for _ in range(20):
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
            server.accept()[0].close()


@pytest.mark.parametrize(("limit", "clients"), [(65_536, 4096), (4096, 1536), (2048, 716)])
def test_clients_follow_the_files_that_may_be_open(limit: int, clients: int) -> None:
    assert most_clients(limit) == clients


@pytest.mark.parametrize(("hard", "then"), [(1024, "only 1024 files may be open"), (4096, "4096 4096")])
def test_the_limit_is_raised_as_far_as_it_goes(hard: int, then: str) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
        "from cluster.fleet.open_files import raise_limit\n"
        "try: print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(then)


def test_the_first_that_complains_most_gravely_is_the_cause(tmp_path: Path) -> None:
    (tmp_path / "raylet.out").write_text(
        "[2026-01-01 00:00:00,000 I 1 1] (raylet) main.cc:1: starting\n"
        "[2026-01-01 00:00:01,000 E 1 1] (raylet) io.cc:2: something small\n"
        "[2026-01-01 00:00:02,000 C 1 1] (raylet) store.cc:3:  Check failed: no memory\n"
        "*** StackTrace Information ***\n"
    )
    assert ray_logs.cause(tmp_path) == "raylet: Check failed: no memory"
    (tmp_path / "gcs_server.err").write_text("[2026-01-01 00:00:00,000 E 1 1] (gcs_server) tls.cc:9: no certificate\n")
    assert ray_logs.cause(tmp_path) == "gcs_server: no certificate"
    assert ray_logs.cause(tmp_path / "nowhere") is None


def test_logs_outlive_the_run_directory_and_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(8):
        session = tmp_path / f"em-{number}" / f"session_{number}"
        (session / "logs").mkdir(parents=True)
        (session / "logs" / "raylet.out").write_text("words")
        (session.parent / "session_latest").symlink_to(session.name)
        kept = ray_logs.keep(session.parent / "session_latest" / "logs", tmp_path / "kept")
        assert kept is not None and (kept / "raylet.out").read_text() == "words"
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == [f"session_{n}" for n in range(3, 8)]
    assert ray_logs.keep(tmp_path / "nowhere", tmp_path / "kept") is None


def test_a_signal_is_heard_while_a_library_waits() -> None:
    """Python's own handler runs when the library comes back: minutes later, if nobody answers it."""
    code = (
        "import ctypes, os\n"
        "from cluster.fleet.signals import Signals\n"
        "signals = Signals()\n"
        "def end(): print('ended', flush=True); os._exit(7)\n"
        "print('waiting', flush=True)\n"
        "with signals.deferred(), signals.heard_at_once(end, 0.1):\n"
        "    [ctypes.CDLL(None).usleep(900_000) for _ in range(600)]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    process.send_signal(2)
    assert process.wait(30) == 7
    assert process.stdout.read() == "ended\n"
