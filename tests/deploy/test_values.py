"""Would catch values that are misspelt or do not fit together and are taken all the same, a rule whose words help
nobody, and a value that nobody explains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config_load import load
from tests.deploy import kuberay, schemas
from tests.deploy.rendering import CASES, CHART, HELMS, Rendered, helm, render

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


def test_two_releases_in_a_namespace_do_not_meet(tmp_path: Path) -> None:
    values = yaml.safe_load(CASES["monitored"].read_text()) | {"extraObjects": []}
    first, second = (_rendered(values, tmp_path, release) for release in ("a", "b"))
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
        if "$ref" in rule:
            rule = schema["$defs"][rule["$ref"].rpartition("/")[2]]
        if "properties" in rule and path != "config":
            assert rule["additionalProperties"] is False, path
            assert set(rule["properties"]) - OPEN <= set(value), path
            for key, part in value.items():
                compare(part, rule["properties"][key], f"{path}.{key}".strip("."))

    compare(values, schema, "")
