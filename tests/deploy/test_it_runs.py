"""The laptop example, rendered and run: what KubeRay would start, as processes in networks of their own, told what to
serve as the operator tells it, asked as kubelet, clients and Prometheus ask, and resized by Ray's own autoscaler.

Would catch parameters that Ray refuses, an environment in which a process cannot start (its user, its read-only root),
probes that say what is not, a policy that cuts what is needed or leaves open what is not, a pool that ignores its
number, a drain that drops requests.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_server

import psutil
import pytest

from tests.cluster_fixture import run, wait_until
from tests.deploy import kuberay, network, tools
from tests.deploy.release import Release, release
from tests.deploy.rendering import ROOT, Rendered, case

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

_VALUES = ("model.source=pvc", "model.path=tiny", "model.storage.type=pvc", "model.storage.existingClaim=models",
           "monitoring.podMonitor.enabled=true", "config.kv_cache_mb=16", "autoscaling.idleTimeoutSeconds=15",
           "config.expert_slots=17",  # one worker has room for all
           "experts.minReplicas=2",  # or a pod that waits for a slow start would be idle, and go
           "networkPolicy.clients[0].podSelector.matchLabels.app=client",
           r"networkPolicy.monitoringNamespaceSelector.matchLabels.kubernetes\.io/metadata\.name=monitoring",
           )  # fmt: skip
_OF_RAY = (6379, 8265, 8100, 10001, 52365)  # and the admin API, on the head


def _rendered(*values: str) -> Rendered:
    return case("laptop", *(part for value in (*_VALUES, *values) for part in ("--set", value)))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """The release once it answers, having come up in the order in which KubeRay and kubelet do it."""
    if reason := network.why_not():
        tools.missing(reason)
    directory = tmp_path_factory.mktemp("release")
    made = run("model", "random", str(directory / "claim" / "tiny"))
    assert made.returncode == 0, made.stderr
    with release(_rendered(), directory, {"models": directory / "claim"}) as found:
        head = found.start_head()
        head.wait("startupProbe")
        found.reconcile()
        found.tell(found.rendered.serve)
        router = found.pods["routers-0"]
        assert not router.probe("readinessProbe"), "ready before there is anything to serve"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            for name in ("head", "experts-0", "experts-1", "routers-0"):
                found.pods[name].wait(kind)
        wait_until(lambda: found.application().get("status") == "RUNNING", 60)
        found.publish()
        yield found


def test_a_client_is_answered(running: Release) -> None:
    answer = running.complete()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert running.complete(key="wrong").status_code == 401


def test_helm_test_passes(running: Release) -> None:
    manifest = running.rendered.one("Pod")
    pod = running.start(manifest)
    assert pod.main.wait(120) == 0 and pod.main.text().strip(), pod.main.text()


def test_policies_let_in_who_is_meant(running: Release) -> None:
    head, router, expert = (running.pods[name].host for name in ("head", "routers-0", "experts-0"))
    client, stranger, prometheus, operator = running.client, running.stranger, running.prometheus, running.operator
    assert running.reaches(client, router, 8000) and running.reaches(operator, head, 8265)
    for port in _OF_RAY:
        assert running.reaches(expert, head, port) or port == 10001, f"nobody listens on {port}"
    allowed = [(who, where, port) for who in (client, stranger, prometheus, operator)
               for where, ports in ((head, (*_OF_RAY, 9400)), (router, (8000, 9400)), (expert, (9400,)))
               for port in ports if running.reaches(who, where, port)]  # fmt: skip
    assert allowed == [(client, router, 8000), *((prometheus, where, 9400) for where in (head, router, expert)),
                       (operator, head, 8265), (operator, head, 52365)]  # fmt: skip


def test_pods_reach_nothing_outside_but_what_is_named(running: Release) -> None:
    expert, stranger = running.pods["experts-0"].host, running.stranger
    listening = [stranger.call(create_server, ("0.0.0.0", port)) for port in (443, 8443)]
    assert [running.reaches(expert, stranger, port) for port in (443, 8443)] == [True, False]
    assert running.reaches(running.operator, stranger, 8443)
    for server in listening:
        server.close()


def test_prometheus_finds_every_process(running: Release) -> None:
    """Through the ports that the PodMonitor names."""
    monitor = running.rendered.one("PodMonitor")["spec"]
    found = set()
    for pod in running.pods.values():
        assert all(pod.labels.get(key) == value for key, value in monitor["selector"]["matchLabels"].items())
        ports = {port["name"]: port["containerPort"] for port in pod.main.spec["ports"]}
        for endpoint in monitor["podMetricsEndpoints"]:
            if endpoint["port"] in ports and running.reaches(running.prometheus, pod.host, ports[endpoint["port"]]):
                url = f"http://{pod.host.address}:{ports[endpoint['port']]}/metrics"
                text = running.ask(running.prometheus, "GET", url).text
                found |= set(re.findall(r'^expertmesh_build_info\{.*process="([a-z]+(?:-\d+)?)', text, re.M))
    assert {"controller", "router-0", "expert-0", "expert-1"} < found and any("gateway" in name for name in found)


def test_the_pool_follows_its_number(running: Release) -> None:
    """`helm upgrade --set experts.replicas=3`: an argument changes in place, Ray's autoscaler asks for the pod, and for
    its end when the number is lower again; whoever asks meanwhile sees nothing of it."""
    larger = _rendered("experts.replicas=3")
    assert kuberay.cluster_hash(larger.cluster) == kuberay.cluster_hash(running.rendered.cluster)
    with _asking(running):
        running.tell(larger.serve)
        running.until(lambda: len(running.ready("experts")) == 3)
        assert running.api.group("experts")["replicas"] == 3

        running.tell(running.rendered.serve)
        running.until(lambda: sum("experts" in name for name in running.pods) == 2)
        assert running.api.group("experts")["replicas"] == 2
    assert not running.api.unknown


@contextmanager
def _asking(running: Release) -> Iterator[None]:
    """A client that asks all the while, and each time gets the same answer."""
    done, answers = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            answer = running.complete()
            answers.append(answer.json()["choices"][0]["text"] if answer.is_success else answer.text)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert len(answers) > 3 and set(answers) == {answers[0]} == {running.complete().json()["choices"][0]["text"]}


_STARTS_A_POD = """
import sys, time
from pathlib import Path
from tests.deploy.network import network
from tests.deploy.pod import Pod, Sources
from tests.deploy.rendering import case

pod = case("laptop").one("Pod")
pod["spec"]["containers"][0] |= {"command": ["sleep"], "args": ["4321"], "volumeMounts": []}
pod["spec"]["volumes"] = []
with network() as net:
    made = Pod(net, pod, Sources({}, {}, Path("/")), Path(sys.argv[1]))
    made.start()
    print(made.main.execute(["true"]).returncode, flush=True)
    time.sleep(60)
"""


def test_nothing_outlives_the_tests(tmp_path: Path) -> None:
    """Also of those that are killed."""
    if reason := network.why_not():
        tools.missing(reason)

    def left() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == ["sleep", "4321"]]

    command = [sys.executable, "-c", _STARTS_A_POD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as test:
        try:
            assert test.stdout is not None and test.stdout.readline() == "0\n"
            assert len(left()) == 1
        finally:
            test.kill()
    wait_until(lambda: not left(), 30)
