"""The laptop example, rendered and run: what KubeRay would start, as processes in networks of their own, told what to
serve as the operator tells it, asked as kubelet, clients and Prometheus ask. Would catch parameters that Ray refuses,
an environment in which a process cannot start (its user, its read-only root), probes that say what is not, a policy
that cuts what is needed or leaves open what is not, a pool that ignores its number, a drain that drops requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster_fixture import run, wait_until
from tests.deploy import kuberay, network, tools
from tests.deploy.network import Host, Network, within
from tests.deploy.pod import Pod
from tests.deploy.rendering import Object, Rendered, case

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

_KEY, _TOKEN = "a-key-of-a-client", "a-token-of-ray"
_VALUES = ("model.source=pvc", "model.path=tiny", "model.storage.type=pvc", "model.storage.existingClaim=models",
           "monitoring.podMonitor.enabled=true", "config.kv_cache_mb=16",
           "networkPolicy.clients[0].podSelector.matchLabels.app=client",
           r"networkPolicy.monitoringNamespaceSelector.matchLabels.kubernetes\.io/metadata\.name=monitoring",
           )  # fmt: skip


def _rendered(*values: str) -> Rendered:
    return case("laptop", *(part for value in (*_VALUES, *values) for part in ("--set", value)))


@dataclass
class Release:
    """The release as it runs, and those around it."""

    rendered: Rendered
    net: Network
    directory: Path
    claims: dict[str, Path]
    pods: list[Pod] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = {thing["metadata"]["name"] for thing in self.rendered.all("Secret")}
        self.secrets = {name: {"api-keys": _KEY, "admin-token": "an-admin-token"} for name in names}
        self.secrets["raycluster"] = {"auth_token": _TOKEN}
        self.client = self.net.add("client", {"app": "client"})
        self.stranger = self.net.add("stranger", {"app": "stranger"})
        self.operator = self.net.add("operator", {"app.kubernetes.io/name": "kuberay-operator"}, "kuberay")
        self.prometheus = self.net.add("prometheus", {}, "monitoring")

    def start(self, manifest: Object) -> Pod:
        head = self.pods[0].host if self.pods else None
        manifest["spec"]["containers"][0]["env"] += [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "raycluster", "key": "auth_token"}}},
        ]
        pod = Pod(self.net, manifest, self.secrets, self.claims, self.directory, head=head)
        self.pods.append(pod)
        self.net.apply(self.rendered.all("NetworkPolicy"))
        return pod

    def start_group(self, group: str, number: int) -> Pod:
        spec = next(g for g in self.rendered.cluster["workerGroupSpecs"] if g["groupName"] == group)
        manifest = kuberay.worker_pod(spec)
        manifest["metadata"]["name"] = f"{group}-{number}"
        return self.start(manifest)

    def tell(self, serve: Object) -> None:
        """What the operator sends to the head."""
        url = f"http://{self.pods[0].host.address}:8265/api/serve/applications/"
        answer = self.ask(self.operator, "PUT", url, json=serve, headers={"Authorization": f"Bearer {_TOKEN}"})
        assert answer.status_code == 200, answer.text

    def application(self) -> Object:
        url = f"http://{self.pods[0].host.address}:8265/api/serve/applications/"
        answer = self.ask(self.operator, "GET", url, headers={"Authorization": f"Bearer {_TOKEN}"})
        return dict(answer.json()["applications"].get("expertmesh", {}))

    def service(self) -> str:
        """Where the Service leads: a ready pod that it selects, at the port of the name that it has."""
        spec = self.rendered.one("Service")["spec"]
        for pod in self.pods:
            if all(pod.host.labels.get(key) == value for key, value in spec["selector"].items()):
                ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
                return f"http://{pod.host.address}:{ports[spec['ports'][0]['targetPort']]}"
        raise AssertionError("the Service selects no pod")

    def chat(self, n_tokens: int = 8, **headers: str) -> httpx.Response:
        body = {"model": self.rendered.arguments["served_model_name"], "max_tokens": n_tokens, "ignore_eos": True,
                "prompt": "once", "temperature": 0}  # fmt: skip
        url = f"{self.service()}/v1/completions"
        return self.ask(self.client, "POST", url, json=body, headers=headers or {"Authorization": f"Bearer {_KEY}"})

    def ask(self, who: Host, method: str, url: str, **options: Any) -> httpx.Response:
        def call() -> httpx.Response:
            with httpx.Client(trust_env=False, timeout=120) as client:
                return client.request(method, url, **options)

        return within(who.name, call)

    def reaches(self, who: Host, pod: Pod, port: int) -> bool:
        """Whether a connection of `who` gets through the policies: also a refusal of the port itself counts."""

        def call() -> bool:
            import socket

            with socket.socket() as probe:
                probe.settimeout(3)
                try:
                    probe.connect((pod.host.address, port))
                except (TimeoutError, OSError):
                    return False
                return True

        return within(who.name, call)


@pytest.fixture
def release(tmp_path: Path) -> Iterator[Release]:
    if reason := network.why_not():
        tools.missing(reason)
    claim = tmp_path / "claim"
    made = run("model", "random", str(claim / "tiny"))
    assert made.returncode == 0, made.stderr
    with _ended(tmp_path, {"models": claim}) as running:
        yield running


@contextmanager
def _ended(directory: Path, claims: dict[str, Path]) -> Iterator[Release]:
    for folder in (directory, *directory.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)  # the pods' user passes through
    with network.network() as net:
        running = Release(_rendered(), net, directory, claims)
        try:
            yield running
        finally:
            for pod in reversed(running.pods):
                pod.end()


def test_the_laptop_example_runs(release: Release) -> None:
    rendered = release.rendered
    head = release.start(kuberay.head_pod(rendered.cluster))
    head.wait("startupProbe")
    router = release.start_group("routers", 0)
    experts = [release.start_group("experts", number) for number in range(2)]
    assert not router.probe("readinessProbe"), "ready before there is anything to serve"
    release.tell(rendered.serve)

    # As kubelet does it: a container counts as started first, then as ready; alive it is all the time.
    for pod in (*experts, router):
        pod.wait("startupProbe")
    for pod in (*experts, router):
        pod.wait("readinessProbe")
    assert all(pod.probe("livenessProbe") for pod in release.pods)
    wait_until(lambda: release.application().get("status") == "RUNNING", 60)

    answer = release.chat()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert release.chat(Authorization="Bearer wrong").status_code == 401

    _policies_hold(release, head, router, experts[0])
    _prometheus_finds_every_process(release)
    _the_pool_follows_its_number(release, answer.json()["choices"][0]["text"])
    _a_drain_drops_nothing(release, router)


def _policies_hold(release: Release, head: Pod, router: Pod, expert: Pod) -> None:
    assert release.reaches(release.client, router, 8000) and not release.reaches(release.stranger, router, 8000)
    assert release.reaches(release.operator, head, 8265)
    assert release.reaches(release.prometheus, expert, 9400)
    for who in (release.client, release.stranger, release.prometheus):
        for port in (6379, 8265, 8100, 10001, 52365):
            assert not release.reaches(who, head, port), f"{who.name} reaches the head's port {port}"
    assert not release.reaches(release.client, expert, 9400)


def _prometheus_finds_every_process(release: Release) -> None:
    """Through the ports that the PodMonitor names."""
    monitor = release.rendered.one("PodMonitor")["spec"]
    roles = set()
    for pod in release.pods:
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        for endpoint in monitor["podMetricsEndpoints"]:
            if endpoint["port"] in ports:
                url = f"http://{pod.host.address}:{ports[endpoint['port']]}/metrics"
                text = release.ask(release.prometheus, "GET", url).text
                roles |= {role for role in ("gateway", "router", "expert", "controller") if f'role="{role}"' in text}
    assert roles == {"gateway", "router", "expert", "controller"}


def _the_pool_follows_its_number(release: Release, text: str) -> None:
    """`helm upgrade --set experts.replicas=3`: an argument changes in place, Ray's autoscaler makes the pod."""
    larger = _rendered("experts.replicas=3")
    assert kuberay.cluster_hash(larger.cluster) == kuberay.cluster_hash(release.rendered.cluster)
    release.tell(larger.serve)
    third = release.start_group("experts", 2)
    third.wait("startupProbe")
    third.wait("readinessProbe")
    assert release.chat().json()["choices"][0]["text"] == text

    release.tell(release.rendered.serve)  # and back: experts move away first, then the worker ends
    wait_until(lambda: sum(pod.probe("readinessProbe") for pod in release.pods if "experts" in pod.name) == 2, 120)
    assert release.chat().json()["choices"][0]["text"] == text


def _a_drain_drops_nothing(release: Release, router: Pod) -> None:
    """kubelet calls the hook while a request is open: it comes back when the request is answered."""
    answers: list[httpx.Response] = []
    request = threading.Thread(target=lambda: answers.append(release.chat(400)))
    request.start()
    time.sleep(0.5)
    assert "0 requests are left" in router.drain()
    request.join(60)
    assert json.loads(answers[0].text)["usage"]["completion_tokens"] == 400
