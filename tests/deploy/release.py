"""A release as it runs: the rendered chart, made pods as KubeRay makes them, and those around it who ask."""

from __future__ import annotations

import itertools
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.deploy import kuberay
from tests.deploy.network import Host, Network, network
from tests.deploy.operator import ApiServer, api_server
from tests.deploy.pod import Pod, Sources
from tests.deploy.rendering import Object, Rendered

KEY, RAY_TOKEN = "a-key-of-a-client", "a-token-of-ray"
ADDRESS = "10.96.0.10"  # of the Service
_RAY = {"Authorization": f"Bearer {RAY_TOKEN}"}


class Release:
    """`pods` by name. What somebody is allowed to reach follows from where in the network he is."""

    def __init__(self, rendered: Rendered, net: Network, directory: Path, sources: Sources, api: ApiServer) -> None:
        self.rendered, self.pods, self.api = rendered, dict[str, Pod](), api
        self._net, self._directory, self._sources = net, directory, sources
        self._numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)  # a pod's name is never another's
        self._pending: dict[str, Object] = {}  # manifests of pods that there are to be, by name
        net.policies = rendered.all("NetworkPolicy")
        self.client = net.add({"app": "client"})
        self.stranger = net.add({"app": "stranger"})
        self.operator = net.add({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay")
        self.prometheus = net.add({}, "monitoring")

    def start(self, manifest: Object) -> Pod:
        pod = Pod(self._net, manifest, self._sources, self._directory)
        self._net.refresh()
        pod.start()
        return pod

    def start_head(self) -> Pod:
        """The operator makes all pods at once; the others start with the next `reconcile`."""
        self._make_pods()  # before Ray's autoscaler looks: it would ask for those that it misses
        self._tell_api_server()
        spec = self.api.cluster["spec"]
        often = {"env": [{"name": "AUTOSCALER_UPDATE_INTERVAL_S", "value": "1"}]}  # it looks every five seconds else
        manifest = kuberay.head_pod(spec | {"autoscalerOptions": spec["autoscalerOptions"] | often})
        pod = self.pods["head"] = self.start(kuberay.with_token(manifest, "raycluster"))
        self._net.names[kuberay.HEAD_SERVICE] = pod.host.address
        self._tell_api_server()
        return pod

    def reconcile(self) -> None:
        """What the operator does again and again: there are to be as many pods as the RayCluster says."""
        for group in self.api.cluster["spec"]["workerGroupSpecs"]:
            for name in group.get("scaleStrategy", {}).get("workersToDelete", []):
                if name in self.pods:
                    self.end(name)
        self._make_pods()
        while self._pending:
            name, manifest = self._pending.popitem()
            self.pods[name] = self.start(manifest)
        self._tell_api_server()

    def _make_pods(self) -> None:
        for group in self.api.cluster["spec"]["workerGroupSpecs"]:
            name = group["groupName"]
            there = [pod.labels for pod in self.pods.values()]
            there += [manifest["metadata"]["labels"] for manifest in self._pending.values()]
            for _ in range(group["replicas"] - sum(labels["ray.io/group"] == name for labels in there)):
                manifest = kuberay.with_token(kuberay.worker_pod(group), "raycluster")
                manifest["metadata"]["name"] = pod = f"{name}-{next(self._numbers[name])}"
                self._pending[pod] = manifest

    def end(self, name: str) -> str:
        """As kubelet ends a pod, and Kubernetes forgets it. What its hook said."""
        pod = self.pods.pop(name)
        said = pod.drain()
        pod.end()
        return said

    def _tell_api_server(self) -> None:
        running = [
            {"metadata": {"name": name, "namespace": "default", "labels": pod.labels, "resourceVersion": "1"},
             "spec": pod.spec,
             "status": {"podIP": pod.host.address, "containerStatuses": [{"state": {"running": {}}}]}}
            for name, pod in self.pods.items()
        ]  # fmt: skip
        self.api.pods = running + [
            {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": "1"}, "status": {}}
            for manifest in self._pending.values()
        ]

    def until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Reconcile until `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            self.reconcile()
            time.sleep(0.3)

    def ready(self, group: str) -> list[str]:
        """Pods of a group that have started and are ready, by name."""
        pods = [pod for pod in self.pods.values() if pod.labels["ray.io/group"] == group]
        return [pod.name for pod in pods if pod.probe("startupProbe") and pod.probe("readinessProbe")]

    def publish(self) -> None:
        """The Service leads to the ready pods that it selects, at the port of the name that it has."""
        service = self.rendered.one("Service")
        selector, target = service["spec"]["selector"], service["spec"]["ports"][0]["targetPort"]
        endpoints = [
            (pod.host.address, port["containerPort"])
            for pod in self.pods.values()
            if all(pod.labels.get(key) == value for key, value in selector.items()) and pod.probe("readinessProbe")
            for port in pod.main.spec["ports"]
            if port["name"] == target
        ]
        self._net.publish(service, ADDRESS, endpoints)

    def tell(self, serve: Object) -> None:
        """What the operator sends to the head."""
        answer = self.ask(self.operator, "PUT", self._applications(), json=serve, headers=_RAY)
        assert answer.status_code == 200, answer.text

    def application(self) -> Object:
        answer = self.ask(self.operator, "GET", self._applications(), headers=_RAY)
        return dict(answer.json()["applications"].get("expertmesh", {}))

    def _applications(self) -> str:
        return f"http://{self.pods['head'].host.address}:8265/api/serve/applications/"

    def complete(self, n_tokens: int = 8, key: str = KEY) -> httpx.Response:
        """A completion, asked for by a client at the Service."""
        body = {"model": self.rendered.arguments["served_model_name"], "max_tokens": n_tokens, "ignore_eos": True,
                "prompt": "once", "temperature": 0}  # fmt: skip
        port = self.rendered.one("Service")["spec"]["ports"][0]["port"]
        url, headers = f"http://{ADDRESS}:{port}/v1/completions", {"Authorization": f"Bearer {key}"}
        return self.ask(self.client, "POST", url, json=body, headers=headers)

    def ask(self, who: Host, method: str, url: str, **options: Any) -> httpx.Response:
        def call() -> httpx.Response:
            with httpx.Client(trust_env=False, timeout=120) as client:
                return client.request(method, url, **options)

        return who.call(call)

    def reaches(self, who: Host, where: Host, port: int) -> bool:
        """Whether a connection is made: neither the policies nor the host itself refuse it."""

        def call() -> bool:
            try:
                socket.create_connection((where.address, port), 5).close()
            except OSError:
                return False
            return True

        return who.call(call)


@contextmanager
def release(rendered: Rendered, directory: Path, claims: dict[str, Path]) -> Iterator[Release]:
    """One of which nothing runs yet, and nothing does afterwards."""
    keys = {"api-keys": KEY, "admin-token": "a-token-of-an-operator"}
    secrets = {secret["metadata"]["name"]: keys for secret in rendered.all("Secret")}
    account = directory / "account"
    account.mkdir()
    with network() as net:
        kubernetes = net.add({}, "kube-system")
        net.names["kubernetes.default"] = kubernetes.address
        with api_server(kubernetes, rendered.cluster, account) as api:
            secrets["raycluster"] = {"auth_token": RAY_TOKEN}
            made = Release(rendered, net, directory, Sources(secrets, claims, account), api)
            try:
                yield made
            finally:
                for pod in made.pods.values():
                    pod.end()
