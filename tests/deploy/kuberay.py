"""What KubeRay makes of a RayCluster: its pods, and the hash by which it decides whether a cluster has to be replaced.

Ours, after its sources of 1.7 (`controllers/ray/common/pod.go`, `utils.GenerateHashWithoutReplicasAndWorkersToDelete`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
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
    scaled = spec.get("enableInTreeAutoscaling", False)
    own = {"dashboard-host": "0.0.0.0"} | ({"no-monitor": "true"} if scaled else {})
    pod = _pod("head", group, _parameters(group, own), "127.0.0.1")
    return _with_autoscaler(pod, spec["autoscalerOptions"]) if scaled else pod


def with_token(pod: Object, secret: str) -> Object:
    """What `authOptions` adds: Ray's token, from a secret that KubeRay makes."""
    source = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    for container in pod["spec"]["containers"]:
        if container["name"] in ("ray-head", "ray-worker", "autoscaler"):
            container["env"] += [
                {"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": source}
            ]  # fmt: skip
    return pod


def worker_pod(group: Object, head: str = HEAD_SERVICE) -> Object:
    """A pod of a worker group. `head`: the name or address at which it finds the head."""
    group = copy.deepcopy(group)
    return _pod(group["groupName"], group, _parameters(group, {"address": f"{head}:6379"}), head)


def pods(spec: Object) -> list[Object]:
    """One of each group."""
    return [head_pod(spec), *(worker_pod(group) for group in spec["workerGroupSpecs"])]


def _with_autoscaler(pod: Object, options: Object) -> Object:
    """Ray's autoscaler beside the head, which shares its log directory alone."""
    head = pod["spec"]["containers"][0]
    logs = {"name": "ray-logs", "mountPath": "/tmp/ray"}
    env = [
        _of_pod("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        _of_pod("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        _of_pod("RAY_HEAD_POD_NAME", "metadata.name"),
    ]
    own = {key: options[key] for key in ("resources", "securityContext", "imagePullPolicy")}
    started = 'ray kuberay-autoscaler --cluster-name "$RAY_CLUSTER_NAME" --cluster-namespace "$RAY_CLUSTER_NAMESPACE"'
    autoscaler = {
        "name": "autoscaler", "image": head["image"], "command": ["/bin/bash", "-c", "--"], "args": [started],
        "env": [*env, {"name": "KUBERAY_CRD_VER", "value": "v1"}, *options.get("env", [])],
        "volumeMounts": [*options.get("volumeMounts", []), logs], **own,
    }  # fmt: skip
    head["volumeMounts"].append(logs)
    if options["version"] == "v2":
        head["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"})
    pod["spec"]["volumes"].append({"name": "ray-logs", "emptyDir": {}})
    pod["spec"]["containers"].append(autoscaler)
    return pod


def _parameters(group: Object, own: dict[str, str]) -> dict[str, str]:
    """Of `ray start`: the chart's, and what KubeRay adds where the chart has none."""
    container = group["template"]["spec"]["containers"][0]
    found = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", **own, **group["rayStartParams"]}
    found["block"] = "true"
    limits, requests = container["resources"].get("limits", {}), container["resources"].get("requests", {})
    if "num-cpus" not in found and (cpu := limits.get("cpu", requests.get("cpu"))):
        found["num-cpus"] = str(_cpus(cpu))
    if memory := limits.get("memory"):
        found.setdefault("memory", str(_bytes(memory)))
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
        _of_pod("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        _of_pod("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _of_pod("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
        {"name": "RAY_ADDRESS", "value": f"{head}:6379"},
        {"name": "FQ_RAY_IP", "value": head},
        {"name": "RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO", "value": "0"},
        {"name": "RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS", "value": "5"},
        {"name": "RAY_SERVE_KV_TIMEOUT_S", "value": "5"},
    ]
    labels = {
        "ray.io/cluster": "raycluster", "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head" if name == "head" else "worker",
        "ray.io/group": "headgroup" if name == "head" else name,
    }  # fmt: skip
    metadata = {
        "name": name,
        "namespace": "default",
        "labels": {**template["metadata"].get("labels", {}), **labels},
        "annotations": template["metadata"].get("annotations", {}),
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _of_pod(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _word(key: str, value: str) -> str:
    if value.lower() in ("true", "false") and key not in _FLAGS:
        return f"--{key}" if value.lower() == "true" else ""
    return f"--{key}={value}"


def _cpus(quantity: Any) -> int:
    """Whole CPUs, rounded up, as Go's `Quantity.Value` has it."""
    text = str(quantity)
    return -(-int(text[:-1]) // 1000) if text.endswith("m") else -(-int(float(text) * 1000) // 1000)


def _bytes(quantity: Any) -> int:
    found = re.fullmatch(r"([0-9.]+)([KMGT]?i?)", str(quantity))
    assert found, quantity
    prefix, binary = found[2][:1], found[2].endswith("i")
    return int(float(found[1]) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1 if prefix else 0))
