"""A real Prometheus on a real cluster under load: every expression of dashboards, rules and alerts finds something, and
the imbalance is one number everywhere."""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.fleet.run_state import admin_token
from tests.cluster_fixture import RunningCluster, free_port, running_cluster
from tests.deploy.promtool import DEPLOY, need
from tests.deploy.test_prometheus import ALERTS, RULES, expressions, rules
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Prometheus:
    """One that scrapes the cluster once a second."""

    url: str

    def values(self, expr: str) -> list[float]:
        """What the expression gives now, numbers alone."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", (expr, answer)
        found = [float(sample["value"][1]) for sample in answer["data"]["result"]]
        return [value for value in found if not math.isnan(value)]


@contextmanager
def running_prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """With deploy's configuration and rules, of another target and pace."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES), str(ALERTS)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [need("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


class Traffic:
    """Completions without end, several at once, and now and then one that is refused."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(3)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, i: int) -> None:
        body = {"model": self._cluster.model, "prompt": f"Story {i} " * 20, "max_tokens": 40, "ignore_eos": True,
                "temperature": 0.8}  # fmt: skip
        with httpx.Client(base_url=self._cluster.url, timeout=120) as client:
            while not self._stop.is_set():
                answer = client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    self.failed.append(answer.text)
                client.post("/v1/completions", json=body | {"model": "another"})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[RunningCluster]:
    need("prometheus")
    directory = tmp_path_factory.mktemp("observed")
    with running_cluster(directory, tiny_checkpoint, "--routers", "2", "--kv-cache-mb", "16") as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{cluster.port}") as running:
        wait_until(lambda: _answers(running), _PATIENCE_S)
        yield running


def _answers(prometheus: Prometheus) -> bool:
    """Whether it is up and has seen the cluster."""
    try:
        up = httpx.get(f"{prometheus.url}/-/ready", timeout=30).status_code == 200
    except httpx.HTTPError:
        return False
    return up and bool(prometheus.values("expertmesh_rebalance_last_success_timestamp_seconds"))


def _admin(cluster: RunningCluster, path: str) -> Any:
    status = cluster.status()
    headers = {"Authorization": f"Bearer {admin_token(Path(status['run_dir']))}"}
    address = cluster.process_of("controller")["address"]
    return httpx.get(f"http://{address}{path}", headers=headers, timeout=60).raise_for_status().json()


def test_the_imbalance_is_one_number(cluster: RunningCluster, prometheus: Prometheus) -> None:
    """On the page, in status, in the recording rule, the gauge and the receipt. Once nothing is computed any more all
    loads are forgotten alike, so that it stays what it is, but for the moments at which routers tell theirs."""
    with Traffic(cluster) as traffic:
        wait_until(lambda: sum(prometheus.values("expertmesh_worker_window_tokens")) > 5000, _PATIENCE_S)
    assert not traffic.failed
    everywhere = {
        "gauge": lambda: prometheus.values("expertmesh_imbalance_ratio")[0],
        "rule": lambda: prometheus.values("cluster:expertmesh_imbalance:ratio")[0],
        "status": lambda: cluster.process_of("controller")["detail"]["imbalance"],
        "page": lambda: _admin(cluster, "/observation")["imbalance"],
        "placement": lambda: _admin(cluster, "/placement")["imbalance"],
    }

    def settled() -> bool:
        values = [read() for read in everywhere.values()]
        return values == pytest.approx([values[0]] * len(values), rel=2e-3)

    wait_until(settled, _PATIENCE_S)
    rule = next(rule["expr"] for rule in rules(RULES) if rule["record"] == "cluster:expertmesh_imbalance:ratio")
    (apart,) = prometheus.values(f"({rule}) - on (cluster) expertmesh_imbalance_ratio")  # of one scrape: the same
    assert abs(apart) < 1e-9
    number = everywhere["gauge"]()
    assert 1.0 <= number <= 2.0
    done = cluster.command("rebalance")
    assert done.returncode == 0, done.stderr
    receipt = _admin(cluster, "/receipts")[-1]
    assert receipt["imbalance_before"] == pytest.approx(number, rel=2e-3)


def test_every_expression_finds_something(cluster: RunningCluster, prometheus: Prometheus) -> None:
    """Would catch an expression whose labels do not match, a series that nobody sets, a filter that hides all."""
    assert cluster.command("rebalance").returncode == 0  # marks it after Prometheus saw the time before
    asked: dict[str, str] = {}
    for where, expr in expressions().items():
        if "expertmesh_gpu_" in expr:  # there is none
            continue
        for chosen in (".*", "expertmesh"):  # nothing chosen is all; or the one that there is
            asked[f"{where} [{chosen}]"] = expr.replace("$cluster", chosen).replace("$__rate_interval", "10s")
    for rule in rules(ALERTS):  # which give something only when they fire: what they are about
        del asked[f"{rule['alert']} [.*]"], asked[f"{rule['alert']} [expertmesh]"]
        for selector in re.findall(r"(?:cluster:)?expertmesh_[\w:]+(?:\{[^}]*\})?", rule["expr"]):
            asked[f"{rule['alert']}: {selector}"] = selector
    deadline = time.monotonic() + _PATIENCE_S
    with Traffic(cluster):
        while asked and time.monotonic() < deadline:
            asked = {where: expr for where, expr in asked.items() if not prometheus.values(expr)}
            time.sleep(0.5)
    assert not asked, json.dumps(asked, indent=2)
    answer = httpx.get(f"{prometheus.url}/api/v1/rules", timeout=30).json()
    health = {rule["name"]: rule["health"] for group in answer["data"]["groups"] for rule in group["rules"]}
    assert len(health) == len(rules(RULES)) + len(rules(ALERTS)) and set(health.values()) == {"ok"}
