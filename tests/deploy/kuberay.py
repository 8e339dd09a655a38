"""What KubeRay makes of a RayCluster: its pods, and the hash by which it decides whether a cluster has to be replaced.

Ours, after its sources of 1.7 (`controllers/ray/common/pod.go`, `utils.GenerateHashWithoutReplicasAndWorkersToDelete`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from tests.deploy.rendering import Object

HEAD_SERVICE = "raycluster-head-svc"  # by which workers find the head; in a RayService KubeRay names it
_FLAGS = ("log-color", "include-dashboard", "include-log-monitor")  # of which `false` is written too


def cluster_hash(spec: Object) -> str:
    """Another value of it makes a RayService start a new cluster. Numbers of pods do not count."""
    muted = copy.deepcopy(spec)
    muted.pop("upgradeStrategy", None)
    for group in muted["workerGroupSpecs"]:
        for field in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(field, None)
    for group in (muted["headGroupSpec"], *muted["workerGroupSpecs"]):
        group["template"]["spec"].pop("tolerations", None)
        group["template"]["spec"].pop("schedulingGates", None)
    return hashlib.sha256(json.dumps(muted, sort_keys=True).encode()).hexdigest()


def head_pod(spec: Object) -> Object:
    group = copy.deepcopy(spec["headGroupSpec"])
    return _pod("head", group, _parameters(group, {"dashboard-host": "0.0.0.0"}), "127.0.0.1")


def worker_pod(group: Object, head: str = HEAD_SERVICE) -> Object:
    """A pod of a worker group. `head`: the name or address at which it finds the head."""
    group = copy.deepcopy(group)
    return _pod(group["groupName"], group, _parameters(group, {"address": f"{head}:6379"}), head)


def pods(spec: Object) -> list[Object]:
    """One of each group."""
    return [head_pod(spec), *(worker_pod(group) for group in spec["workerGroupSpecs"])]


def _parameters(group: Object, own: dict[str, str]) -> dict[str, str]:
    """Of `ray start`: the chart's, and what KubeRay adds where the chart has none."""
    container = group["template"]["spec"]["containers"][0]
    found = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", **own, **group["rayStartParams"]}
    found["block"] = "true"
    limits, requests = container["resources"].get("limits", {}), container["resources"].get("requests", {})
    if "num-cpus" not in found and (cpu := limits.get("cpu", requests.get("cpu"))):
        found["num-cpus"] = str(_cpus(cpu))
    for name, number in limits.items():
        if name.endswith("gpu"):
            found.setdefault("num-gpus", str(number))
    return found


def _pod(name: str, group: Object, parameters: dict[str, str], head: str) -> Object:
    template = group["template"]
    container = template["spec"]["containers"][0]
    words = [_word(key, value) for key, value in sorted(parameters.items())]
    start = " ".join(["ray start", *(["--head"] if name == "head" else []), *filter(None, words)])
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"]
    container["env"] = [
        *container.get("env", []),
        {"name": "RAY_ADDRESS", "value": f"{head}:6379"},
        {"name": "FQ_RAY_IP", "value": head},
        {"name": "RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO", "value": "0"},
        {"name": "RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS", "value": "5"},
        {"name": "RAY_SERVE_KV_TIMEOUT_S", "value": "5"},
    ]
    labels = {"ray.io/group": "headgroup" if name == "head" else name, "ray.io/is-ray-node": "yes"}
    metadata = {
        "name": name,
        "namespace": "default",
        "labels": {**template["metadata"].get("labels", {}), **labels},
        "annotations": template["metadata"].get("annotations", {}),
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _word(key: str, value: str) -> str:
    if value.lower() in ("true", "false") and key not in _FLAGS:
        return f"--{key}" if value.lower() == "true" else ""
    return f"--{key}={value}"


def _cpus(quantity: Any) -> int:
    """Whole CPUs, rounded up, as Go's `Quantity.Value` has it."""
    text = str(quantity)
    return -(-int(text[:-1]) // 1000) if text.endswith("m") else -(-int(float(text) * 1000) // 1000)
