"""`python -m cluster.fleet.serve_deploy ADDRESS FILE`: tell a Ray cluster what to serve, until it has done so for long.

What a Job does for a RayCluster, where KubeRay does it for a RayService. A head that is replaced meanwhile, as by the
upgrade that made the Job, forgets what it was told; so it is told again, and only a minute of running counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SETTLED_S = 60.0  # KubeRay ends the pods of a cluster that it replaces within seconds
_TICK_S = 2.0
_TIMEOUT_S = 30.0
_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy leads to the head


class Refused(Exception):
    """The cluster does not take the configuration, or cannot serve it."""


def deploy(address: str, config: Mapping[str, Any], token: str = "", settled_s: float = SETTLED_S) -> None:
    """Returns once all applications of `config` (`ServeDeploySchema`) have run for `settled_s` seconds without a break.

    `address`: of the head's dashboard, `http://HOST:8265`. Raises Refused.
    """
    url, told, since, said = f"{address}/api/serve/applications/", False, 0.0, ""
    names = {str(application["name"]) for application in config["applications"]}
    while True:
        try:
            if not told:
                _ask("PUT", url, token, config)
                told, since = True, time.monotonic()
            found = json.loads(_ask("GET", url, token))["applications"]
            states = {name: found[name]["status"] for name in names}
        except KeyError:  # a head that was not told
            told, now = False, "the head knows nothing of it"
        except (OSError, ValueError) as error:
            told, now = False, f"the head does not answer: {error}"
        else:
            now = ", ".join(f"{name} is {state}" for name, state in sorted(states.items()))
            if failed := [name for name, state in states.items() if state == "DEPLOY_FAILED"]:
                raise Refused(f"{failed[0]}: {found[failed[0]].get('message')}")
            if set(states.values()) != {"RUNNING"}:
                since = time.monotonic()
            elif time.monotonic() - since >= settled_s:
                return
        if now != said:
            print(said := now, flush=True)
        time.sleep(_TICK_S)


def _ask(method: str, url: str, token: str, body: Mapping[str, Any] | None = None) -> str:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with _OPEN(urllib.request.Request(url, data, headers, method=method), timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if 400 <= error.code < 500:  # waiting helps against none of these
            raise Refused(f"{method} {url}: {error}: {error.read().decode(errors='replace')}") from error
        raise


def main() -> None:
    address, file = sys.argv[1:]
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    try:
        deploy(address, config, os.environ.get("RAY_AUTH_TOKEN", ""))
    except Refused as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
