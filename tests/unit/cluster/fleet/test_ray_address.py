"""Would catch a start that hands Ray an address at which there is none: Ray tries for minutes, deaf to Ctrl-C."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cluster.errors import StartError
from cluster.fleet import ray_address
from cluster.fleet.ray_address import check_there


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing, as a process that was stopped does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@contextmanager
def gone() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def website() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


CASES = {
    "gone": (gone, "Connection refused"),
    "silent": (silent, "nothing answers within 0.5 s"),
    "website": (website, "something else listens there"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_address_without_ray_is_refused_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_ANSWER_S", 0.5)
    there, reason = CASES[case]
    says = f"{reason}; unset RAY_ADDRESS or --ray-address to start one here"
    with there() as port, pytest.raises(StartError, match=f"no Ray at 127.0.0.1:{port}: {says}"):
        check_there(f"127.0.0.1:{port}")


def test_auto_does_not_believe_what_a_killed_ray_left_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_ray_runs(monkeypatch, tmp_path)
    (tmp_path / "ray").mkdir()
    with gone() as port:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
        with pytest.raises(
            StartError, match=rf"no Ray at auto \([\d.]+:{port}\): Connection refused; unset RAY_ADDRESS"
        ):
            check_there("auto")


def test_auto_without_any_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_ray_runs(monkeypatch, tmp_path)
    with pytest.raises(StartError, match=r"`auto`, but Could not find any running Ray instance.*; unset RAY_ADDRESS"):
        check_there("auto")


@pytest.mark.parametrize("address", ["here", "host:port", "ray://", "10.0.0.1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(StartError, match="is neither `auto` nor HOST:PORT"):
        check_there(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_server_that_answers_is_ray_s_to_judge(host: str) -> None:
    """It may want a token, or know nothing of health."""
    server = grpc.server(ThreadPoolExecutor(1))
    try:
        port = server.add_insecure_port(f"{host}:0")
    except RuntimeError:
        pytest.skip(f"this machine has no {host}")
    server.start()
    assert check_there(f"{host}:{port}") == f"{host}:{port}"
    server.stop(None)


def no_ray_runs(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """As on a machine without Ray, whatever else runs on this one."""
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set())
    monkeypatch.setenv("RAY_TMPDIR", str(directory))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
