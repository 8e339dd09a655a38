"""Would catch a chart that one of the two helms cannot render, objects that an API server, KubeRay or an operator
refuses or silently cuts, references to what is not there, and options that `expertmesh serve` does not know."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest

from tests.deploy import kuberay, schemas
from tests.deploy.rendering import CASES, CHART, HELMS, ROOT, Object, Rendered, case, helm, render
from tests.deploy.snapshots import NAMES, digest, snapshot
from tests.file_server import FileServer, file_server

SECRETS_OF_ONES_OWN = {"hub-token", "redis", "api-keys", "admin-token", "expertmesh-tls", "registry", "mixtral-tls"}
MADE_BY_OTHERS = {"r-expertmesh-ca"}  # by cert-manager
CLAIMS_OF_ONES_OWN = {"models"}
NAME = "app.kubernetes.io/name"


@pytest.mark.parametrize("version", HELMS)
def test_lint(version: str) -> None:
    linted = helm("lint", "--strict", CHART, version=version)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("version", HELMS)
def test_an_install_says_how_to_go_on(version: str) -> None:
    with file_server() as server:
        _answer_discovery(server, render().objects)
        options = ("--dry-run=client", "-n", "ai", "--kube-apiserver", server.url, "--kube-token", "none")
        tried = helm("install", "r", CHART, *options, "--disable-openapi-validation", version=version)
    assert tried.returncode == 0, tried.stderr
    notes = tried.stdout.partition("NOTES:")[2]
    assert "helm -n ai test r" in notes and "get secret r-expertmesh-keys" in notes and "port-forward" in notes


def _answer_discovery(server: FileServer, objects: Iterable[Object]) -> None:
    """An API server that knows the kinds of `objects`, and nothing else: what helm 3 asks before a dry run."""
    server.add("/version", {"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
    kinds: dict[str, list[Object]] = {}
    for api, kind in sorted({(thing["apiVersion"], thing["kind"]) for thing in objects} | {("v1", "Pod")}):
        name = kind.lower().replace("policy", "policie") + "s"
        kinds.setdefault(api, []).append({"name": name, "kind": kind, "namespaced": True, "verbs": ["get", "create"]})
    server.add("/api", {"kind": "APIVersions", "versions": ["v1"]})
    groups = []
    for api, resources in kinds.items():
        path = f"/api/{api}" if api == "v1" else f"/apis/{api}"
        server.add(path, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources})
        if "/" in api:
            version = {"groupVersion": api, "version": api.partition("/")[2]}
            groups.append({"name": api.partition("/")[0], "versions": [version], "preferredVersion": version})
    server.add("/apis", {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})


@pytest.mark.parametrize("name", CASES)
def test_both_helms_render_the_same(name: str, report: dict[str, str]) -> None:
    began = time.monotonic()
    newest = case(name, version=HELMS[0])
    seconds = time.monotonic() - began
    assert sorted(digest(newest)) == sorted(digest(case(name, version=HELMS[1])))
    report["helm"] = " ".join(HELMS)
    report["template"] = f"{seconds * 1e3:.0f} ms"
    report["objects"] = str(len(newest.objects))


@pytest.mark.parametrize("name", CASES)
def test_every_object_is_one_that_a_cluster_takes(name: str, report: dict[str, str]) -> None:
    rendered = case(name)
    own = [thing for thing in rendered.objects if not schemas.is_others(thing)]
    others = [thing for thing in rendered.objects if schemas.is_others(thing)]
    pods = kuberay.pods(rendered.cluster)
    wrong = {f"{thing['kind']} {thing['metadata']['name']}": schemas.check(thing) for thing in (*own, *pods)}
    if others:
        for thing, error in zip(others, schemas.check_others(others), strict=True):
            wrong[f"{thing['kind']} {thing['metadata']['name']}"] = error
    assert not {what: error for what, error in wrong.items() if error}
    report["schemas"] = f"{len(own)} core and KubeRay, {len(others)} others, {len(pods)} pods"


@pytest.mark.parametrize("name", CASES)
def test_what_is_referred_to_is_there(name: str) -> None:
    rendered = case(name)
    secrets = {thing["metadata"]["name"] for thing in rendered.all("Secret")} | SECRETS_OF_ONES_OWN | MADE_BY_OTHERS
    secrets |= {thing["spec"]["secretName"] for thing in rendered.all("Certificate")}
    claims = {thing["metadata"]["name"] for thing in rendered.all("PersistentVolumeClaim")} | CLAIMS_OF_ONES_OWN
    accounts = {thing["metadata"]["name"] for thing in rendered.all("ServiceAccount")}
    for group, template in rendered.templates():
        spec = template["spec"]
        assert spec["serviceAccountName"] in accounts, group
        assert spec["automountServiceAccountToken"] is (group == "head"), "the head's is for Ray's autoscaler"
        assert spec["enableServiceLinks"] is False
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert len(volumes) == len(spec["volumes"]), f"{group}: a volume twice"
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, (group, volume)
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, (group, volume)
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths), f"{group}: two mounts at one path"
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes), group
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or reference["name"] in secrets | {"r-expertmesh"}, (group, variable)


@pytest.mark.parametrize("name", CASES)
def test_ports_meet(name: str) -> None:
    """A Service, a probe, a PodMonitor or a policy that names a port which nobody has is silent until it is needed."""
    rendered = case(name)
    ports = {pod["metadata"]["name"]: _ports(pod) for pod in kuberay.pods(rendered.cluster)}
    assert rendered.one("Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert [group for group, named in ports.items() if "http" in named] == ["routers"], "gateways are routers' alone"
    incremental = (
        rendered.all("RayService")
        and "clusterUpgradeOptions" in rendered.all("RayService")[0]["spec"]["upgradeStrategy"]
    )
    assert ("serve" in ports["head"]) == bool(incremental)
    for pod in kuberay.pods(rendered.cluster):
        container = pod["spec"]["containers"][0]
        numbers = {*ports[pod["metadata"]["name"]].values(), 52365}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[kind]["httpGet"]["port"] in numbers | ({8000} if incremental else set())
    for monitor in rendered.all("PodMonitor"):
        named = {port for found in ports.values() for port in found}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= named
        (cluster,) = [rule["replacement"] for rule in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
                      if rule["targetLabel"] == "cluster"]  # fmt: skip
        assert cluster == rendered.arguments["cluster_name"], "traces have it too"
    assert rendered.arguments["metrics_port"] == ports["routers"]["process-0"]
    assert rendered.arguments["admin_port"] == ports["head"]["admin"]


def _ports(pod: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}


@pytest.mark.parametrize("name", NAMES)
def test_snapshot(name: str) -> None:
    """What a change of the chart changes; `python -m tests.deploy.snapshots` writes them anew."""
    assert digest(case(name)) == snapshot(name)


def test_only_the_api_is_reachable() -> None:
    """Neither dashboard nor admin API nor Ray's own ports may be reached from outside of the release."""
    for name in CASES:
        rendered = case(name)
        exposed = [port["targetPort"] for service in rendered.all("Service") for port in service["spec"]["ports"]]
        assert exposed == ["http"]
        for policy in rendered.all("NetworkPolicy"):
            for rule in policy["spec"].get("ingress", []):
                peers = [peer.get("podSelector") or {} for peer in rule.get("from", [])]
                ports = {port["port"] for port in rule.get("ports", [])}
                inside = peers and all("matchExpressions" in peer for peer in peers)
                operator = ports == {8265, 52365} and peers == [{"matchLabels": {NAME: "kuberay-operator"}}]
                assert inside or operator or (ports and ports <= {8000, 9400, 8080}), (name, policy["metadata"]["name"])


def test_generated_parts_are_current() -> None:
    """README's table, the schema of `config`, the copies of rules and dashboards."""
    from scripts import chart

    stale = [path for path, text in chart.wanted().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python scripts/chart.py`"


def test_extra_objects_and_overrides_reach_their_place() -> None:
    values: dict[str, Any] = {
        "fullnameOverride": "mine", "extraEnv[0].name": "A", "extraEnv[0].value": "b", "experts.env[0].name": "C",
        "experts.env[0].value": "d", "experts.probes.readiness.exec.command[0]": "/bin/true", "openshift": "true",
        "experts.lifecycle.preStop.sleep.seconds": "5", "routers.podDisruptionBudget.minAvailable": "3",
    }  # fmt: skip
    rendered = render(*(part for key, value in values.items() for part in ("--set", f"{key}={value}")))
    head, routers, experts = kuberay.pods(rendered.cluster)
    assert {"name": "A", "value": "b"} in head["spec"]["containers"][0]["env"]
    container = experts["spec"]["containers"][0]
    own = {"name": "C", "value": "d"}
    assert own in container["env"] and own not in routers["spec"]["containers"][0]["env"]
    assert set(container["readinessProbe"]) == {"exec"}
    assert container["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}
    assert "runAsUser" not in experts["spec"]["securityContext"]
    assert rendered.one("PodDisruptionBudget", "mine-routers")["spec"]["minAvailable"] == 3
    assert rendered.one("Service")["metadata"]["name"] == "mine"


def test_monitoring_carries_every_rule_and_dashboard() -> None:
    rendered: Rendered = case("monitored")
    dashboards = rendered.one("ConfigMap", "r-expertmesh-dashboards")["data"] or {}
    assert set(dashboards) == {path.name for path in (ROOT / "deploy/grafana").glob("*.json")}
    groups = rendered.one("PrometheusRule")["spec"]["groups"] or []
    texts = "".join(path.read_text() for path in (ROOT / "deploy/prometheus").glob("[ra]*s.yml"))
    assert all(f"name: {group['name']}" in texts for group in groups)
    assert rendered.one("ConfigMap", "r-mine")["data"]["model"] == "Mixtral-8x7B-Instruct-v0.1"
