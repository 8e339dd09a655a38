"""Would catch values that are misspelt or do not fit together and are taken all the same, a rule whose words help
nobody, and a value that nobody explains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config_load import load
from tests.deploy import kuberay, schemas
from tests.deploy.rendering import CASES, CHART, HELMS, ROOT, Rendered, helm, render
from tests.file_server import file_server

OPEN = {"global", "startup", "readiness", "liveness", "name", "kind", "group", "claims"}  # of what is empty by default
TAKEN = yaml.safe_load(Path(__file__).with_name("taken.yaml").read_text(encoding="utf-8"))
REFUSED = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("taken", TAKEN, ids=lambda taken: json.dumps(taken["values"])[:60])
def test_odd_values_make_what_a_cluster_takes(taken: dict[str, Any], tmp_path: Path) -> None:
    rendered = _rendered(taken["values"], tmp_path, taken.get("release", "r"))
    assert load({**_without_files(rendered.arguments), "ray_address": "auto", "allow_no_keys": True}, {})
    pods = kuberay.pods(rendered.cluster)
    for thing in (*rendered.objects, *pods):
        assert schemas.is_others(thing) or not schemas.check(thing), schemas.check(thing)
        assert len(thing["metadata"]["name"]) <= (47 if thing["apiVersion"] == "ray.io/v1" else 63)
    for pod in pods:  # Ray's autoscaler ends itself over a pool of which it does not know the CPUs
        container = pod["spec"]["containers"][0]
        cpus = container["resources"].get("limits", {}) | container["resources"].get("requests", {})
        assert "--num-cpus" in container["args"][0] or "cpu" in cpus


def test_odd_values_mean_what_is_meant(tmp_path: Path) -> None:
    mig = _rendered({"gpu": {"resource": "nvidia.com/mig-3g.40gb"}}, tmp_path)
    assert [group["rayStartParams"]["num-gpus"] for group in mig.cluster["workerGroupSpecs"]] == ["1", "1"]
    probes = _rendered({"experts": {"probes": {"readiness": {"periodSeconds": 30}}}}, tmp_path)
    probe = kuberay.pods(probes.cluster)[2]["spec"]["containers"][0]["readinessProbe"]
    assert probe == {"httpGet": {"path": "/ready", "port": 9400}, "periodSeconds": 30, "timeoutSeconds": 3,
                     "failureThreshold": 2}  # fmt: skip
    named = _rendered({"model": {"id": "a/b", "servedName": "My Model: 8x7B"}}, tmp_path).arguments
    assert named["served_model_name"] == "My Model: 8x7B" and named["model"].startswith("/models/My-Model-8x7B-")
    assert _rendered({"model": {"id": "a/8"}}, tmp_path).arguments["served_model_name"] == "8"
    balanced = _rendered({"service": {"type": "LoadBalancer"}}, tmp_path)
    (rule,) = balanced.one("NetworkPolicy", "r-expertmesh-api")["spec"]["ingress"]
    assert "from" not in rule, "a load balancer comes from addresses outside of the cluster"
    stepwise = {"strategy": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "eg"}
    (rule,) = _rendered({"upgrade": stepwise}, tmp_path).one("NetworkPolicy", "r-expertmesh-api")["spec"]["ingress"]
    assert {"namespaceSelector": {}} in rule["from"], "a Gateway's pods may be in its controller's namespace"
    (rule,) = _rendered({"networkPolicy": {"apiServerPorts": [8443]}}, tmp_path).one(
        "NetworkPolicy", "r-expertmesh-head")["spec"]["egress"]  # fmt: skip
    assert rule == {"ports": [{"protocol": "TCP", "port": 8443}]}


def test_every_group_is_its_own(tmp_path: Path) -> None:
    """Labels of a kind of GPU merged with those of another fit no node; a variable twice is refused by API servers."""
    h100, l40s = {"pool": "h100", "zone": "a"}, {"gpu": "l40s"}
    values = {
        "experts": {"nodeSelector": h100, "replicas": 3, "env": [{"name": "A", "value": "2"}]},
        "additionalExpertGroups": [{"name": "l40s", "nodeSelector": l40s, "tolerations": [], "replicas": 0},
                                   {"name": "same", "podDisruptionBudget": {"minAvailable": 2}}],
        "extraEnv": [{"name": "A", "value": "1"}, {"name": "HOME", "value": "/tmp"}],
    }  # fmt: skip
    rendered = _rendered(values, tmp_path)
    _, _, experts, other, same = (pod["spec"] for pod in kuberay.pods(rendered.cluster))
    assert (experts["nodeSelector"], other["nodeSelector"], same["nodeSelector"]) == (h100, l40s, h100)
    assert "tolerations" not in other and same["tolerations"] == experts["tolerations"]
    assert [group["replicas"] for group in rendered.cluster["workerGroupSpecs"]] == [1, 3, 0, 3]
    for pod, a in zip(kuberay.pods(rendered.cluster), "11222", strict=True):
        names = [variable["name"] for variable in pod["spec"]["containers"][0]["env"]]
        assert len(set(names)) == len(names)
        own = {variable["name"]: variable.get("value") for variable in pod["spec"]["containers"][0]["env"]}
        assert (own["A"], own["HOME"]) == (a, "/tmp")
    assert rendered.one("PodDisruptionBudget", "r-expertmesh-same")["spec"]["minAvailable"] == 2


def test_whoever_fetches_the_model_has_what_he_needs(tmp_path: Path) -> None:
    """An authority's certificate in a volume, a way to the name servers and the proxy, nodes that take it, room."""
    values = yaml.safe_load(CASES["monitored"].read_text()) | {"openshift": True, "head": {
        "tolerations": [{"operator": "Exists"}], "nodeSelector": {"kubernetes.io/arch": "amd64"}}}  # fmt: skip
    rendered = _rendered(values, tmp_path)
    (job,) = rendered.all("Job")
    spec = job["spec"]["template"]["spec"]
    assert {"name": "ca", "mountPath": "/etc/internal-ca", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert "ca" in {volume["name"] for volume in spec["volumes"]}
    assert spec["tolerations"] and spec["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert rendered.one("Pod")["spec"]["tolerations"] == spec["tolerations"]
    egress = rendered.one("NetworkPolicy", "r-expertmesh")["spec"]["egress"]
    ports = {port["port"] for rule in egress for port in rule.get("ports", [])}
    assert ports == {53, 5353, 3128}, "name servers of OpenShift, and the proxy"
    assert _volume(_rendered({"model": {"id": "a/b"}}, tmp_path)) == {"emptyDir": {}}, "a pod over a limit is evicted"
    claimed = {"id": "a", "source": "pvc", "path": "a", "storage": {"type": "pvc", "existingClaim": "c"}}
    assert _volume(_rendered({"model": claimed}, tmp_path)) == {
        "persistentVolumeClaim": {"claimName": "c", "readOnly": True}
    }, "else a volume that is read-only for many is not attached"


def _volume(rendered: Rendered) -> dict[str, Any]:
    volumes = kuberay.pods(rendered.cluster)[0]["spec"]["volumes"]
    return next({key: value for key, value in volume.items() if key != "name"} for volume in volumes
                if volume["name"] == "models")  # fmt: skip


def test_urls_of_storage_are_taken(tmp_path: Path) -> None:
    for uri, remote in {
        "s3://b/p": ":s3,provider=AWS,env_auth=true:b/p", "gs://b/p": ":gcs,env_auth=true:b/p",
        ":azureblob,env_auth:c/p": ":azureblob,env_auth:c/p", "mine:b/p": "mine:b/p",
    }.items():  # fmt: skip
        rendered = _rendered({"model": {"id": "m", "source": "objectStorage", "uri": uri}}, tmp_path)
        assert kuberay.pods(rendered.cluster)[0]["spec"]["initContainers"][0]["args"][-1] == remote


@pytest.mark.parametrize("name", CASES)
def test_two_renderings_are_the_same(name: str) -> None:
    """What renders without a cluster, as Argo CD does, would else see another release each time."""
    options = ("-f", CASES[name], "--set", "apiKeys.existingSecret=keys,admin.existingSecret=admin")
    first, second = (helm("template", "r", CHART, *options).stdout for _ in range(2))
    assert first == second and "kind: Ray" in first


def test_a_key_is_found_among_comments_limits_and_hashes(tmp_path: Path) -> None:
    """By `helm test`, and by the command that the notes give."""
    file = tmp_path / "api-keys"
    file.write_text(f"# of the team\nsha256:{'0' * 64} name=a\n\nthe-key name=b max_open=3\nother\n")
    with file_server() as server:
        server.pages["/v1"] = (b'{"choices": [{"message": {"content": "Hi"}}], "usage": {"completion_tokens": 1}}', {})
        (script,) = render().one("Pod")["spec"]["containers"][0]["args"]
        script = script.replace("/etc/expertmesh/keys/api-keys", str(file))
        script = script.replace("(request, timeout=60)", "([print(request.headers), request.full_url][1])")
        environ = {"URL": f"{server.url}/v1", "MODEL": "m", "TIMEOUT_S": "5"}
        asked = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert "'Bearer the-key'" in asked.stdout
    notes = (CHART / "templates/NOTES.txt").read_text()
    pick = re.search(r"base64 -d \| (awk '.*?')\)", notes)
    assert pick is not None
    picked = subprocess.run(f"{pick[1]} {file}", shell=True, capture_output=True, text=True, check=True)
    assert picked.stdout == "the-key\n"


def test_clients_reach_every_route_that_is_theirs(tmp_path: Path) -> None:
    """Through an Ingress: a route that was added to the gateway is in its paths, or said to be for inside alone."""
    inside = {"/", "/page/{name}", "/live", "/live/operate/{verb:path}", "/load", "/metrics", "/metrics/targets",
              "/server_info", "/tokenizer_info"}  # fmt: skip
    found = set()
    for path in (ROOT / "cluster/gateway").rglob("*.py"):
        text = path.read_text()
        prefix = re.search(r'APIRouter\([^)]*prefix="([^"]+)"', text)
        for route in re.findall(r'@router\.(?:get|post|delete)\(\s*"([^"]+)"', text):
            found.add((prefix[1] if prefix else "") + route)
    (ingress,) = _rendered({"ingress": {"enabled": True, "hosts": ["a.b"]}}, tmp_path).all("Ingress")
    paths = [path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]]
    assert len(found) > 15 and inside <= found
    for route in found - inside:
        assert any(f"{route}/".startswith(f"{path}/") for path in paths), route
    assert not [route for route in inside if any(f"{route}/".startswith(f"{path}/") for path in paths)]


def test_two_releases_in_a_namespace_do_not_meet(tmp_path: Path) -> None:
    values = yaml.safe_load(CASES["monitored"].read_text()) | {"extraObjects": []}
    long = "models-of-the-platform-team-in-production-"
    for names in (("a", "b"), (f"{long}blue", f"{long}green")):
        first, second = (_rendered(values, tmp_path, release) for release in names)
        assert not _names(first) & _names(second)
    for policy in first.all("NetworkPolicy"):
        selector = policy["spec"]["podSelector"]["matchLabels"].items()
        assert not any(selector <= pod["metadata"]["labels"].items() for pod in kuberay.pods(second.cluster))


def _names(rendered: Rendered) -> set[tuple[str, str]]:
    return {(thing["kind"], thing["metadata"]["name"]) for thing in rendered.objects}


def _rendered(values: dict[str, Any], directory: Path, release: str = "r") -> Rendered:
    file = directory / "values.yaml"
    file.write_text(json.dumps(values))
    return render("-f", file, release=release)


def _without_files(arguments: dict[str, Any]) -> dict[str, Any]:
    """Options that name no file of a pod."""
    return {name: value for name, value in arguments.items() if not str(value).startswith("/etc/")}


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: json.dumps(refused["values"])[:60])
def test_values_are_refused_with_words_that_help(refused: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(json.dumps(refused["values"]))
    result = helm("template", "r", CHART, "-f", file)
    assert result.returncode != 0, "taken"
    assert refused["says"] in result.stderr


def test_the_older_helm_refuses_all_of_them_too(tmp_path: Path) -> None:
    for number, refused in enumerate(REFUSED):
        file = tmp_path / f"{number}.yaml"
        file.write_text(json.dumps(refused["values"]))
        assert helm("template", "r", CHART, "-f", file, version=HELMS[1]).returncode != 0, refused["values"]


def test_every_rule_has_values_that_break_it() -> None:
    """Of templates/validate.yaml; a rule that nothing breaks may be one that cannot be broken."""
    text = (CHART / "templates/validate.yaml").read_text()
    rules = re.findall(r'append \$problems \(?(?:printf )?"((?:[^"\\]|\\.)*)"', text)
    assert len(rules) > 15
    said = [str(refused["says"]) for refused in REFUSED]
    for rule in rules:
        shown = re.compile(re.sub(r"%[a-z]", ".*", re.escape(rule).replace(r"\%", "%")))
        parts = [part.strip() for part in re.split(r"%[a-z]", rule) if len(part.strip()) > 10]
        assert any(shown.fullmatch(text) or any(text in part or part in text for part in parts) for text in said), rule


def test_the_schema_knows_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(value: Any, rule: Any, path: str) -> None:
        if "io.k8s" in rule.get("$ref", ""):
            return
        if "$ref" in rule:
            rule = schema["$defs"][rule["$ref"].rpartition("/")[2]]
        if "properties" in rule and path != "config":
            assert rule["additionalProperties"] is False, path
            assert set(rule["properties"]) - OPEN <= set(value), path
            for key, part in value.items():
                compare(part, rule["properties"][key], f"{path}.{key}".strip("."))

    compare(values, schema, "")
