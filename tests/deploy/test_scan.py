"""Would catch a pod that may do more than it has to: the scanner sees the pods as KubeRay makes them, since it does not
look into custom resources."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import yaml

from tests.deploy import kuberay, tools
from tests.deploy.rendering import CASES, Object, case

_CONFIG = Path(__file__).with_name("checkov.yaml")


def test_the_scanner_finds_nothing(tmp_path: Path) -> None:
    for name in CASES:
        rendered = case(name)
        things = [thing for thing in rendered.objects if thing["apiVersion"] != "ray.io/v1"]
        pods = kuberay.pods(rendered.cluster)
        for pod in pods:
            _forgive_the_autoscaler(pod)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all([*things, *pods]))
    command = [*tools.checkov(), "--directory", str(tmp_path), "--config-file", str(_CONFIG), "--output", "json"]
    # Without this it asks its vendor for rules of its own.
    environ = {**os.environ, "LOG_LEVEL": "ERROR", "BC_API_KEY": "", "CKV_SKIP_PACKAGE_UPDATE_CHECK": "true"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=240)
    assert result.stdout.startswith(("{", "[")), result.stderr[-2000:]
    report = json.loads(result.stdout)
    found = set()
    for check in report["results"]["failed_checks"]:
        where = f"{check['resource']} in {check['file_path']}"
        found.add(f"{check['check_id']} {check['check_name']}: {where}")
    assert not found, "\n".join(sorted(found))
    assert report["summary"]["passed"] > 1000 and report["summary"]["parsing_errors"] == 0


def _forgive_the_autoscaler(pod: Object) -> None:
    """KubeRay's container beside the head has no probes, and the scanner forgives nothing of one container alone."""
    own = [container for container in pod["spec"]["containers"] if container["name"] != "autoscaler"]
    if own != pod["spec"]["containers"]:
        assert all({"livenessProbe", "readinessProbe"} <= container.keys() for container in own)
        for number, check in enumerate(("CKV_K8S_8", "CKV_K8S_9")):
            pod["metadata"]["annotations"][f"checkov.io/skip{number}"] = f"{check}=KubeRay's container takes no probes"
