"""Would catch options of the Serve application that `expertmesh serve` does not know or would refuse, and pools that
hold another number of processes than the application asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from cluster.config_load import FIELDS, load
from tests.certificates import Authority
from tests.deploy import kuberay
from tests.deploy.rendering import CASES, case


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_options_that_fit_together(name: str, tmp_path: Path) -> None:
    """The pods run what `expertmesh serve` runs, from the same configuration: it has to take what the chart gives."""
    rendered = case(name)
    ServeDeploySchema.model_validate(rendered.serve)
    arguments = dict(rendered.arguments)
    assert arguments.keys() <= FIELDS.keys()
    files = Authority().write(tmp_path / "tls")
    for option, file in zip(("tls_cert", "tls_key", "tls_ca"), (files.cert, files.key, files.ca), strict=True):
        if option in arguments:
            arguments[option] = str(file)
    for option in ("api_keys_file", "admin_token_file"):
        if option in arguments:
            (tmp_path / option).write_text("a-key-for-tests\n")
            arguments[option] = str(tmp_path / option)
    config = load({**arguments, "ray_address": "auto"}, {}).config
    mounts = {
        mount["mountPath"] for mount in kuberay.head_pod(rendered.cluster)["spec"]["containers"][0]["volumeMounts"]
    }
    for option in ("api_keys_file", "admin_token_file", "tls_cert", "model"):
        if option in arguments:
            assert any(str(rendered.arguments[option]).startswith(f"{mount}/") for mount in mounts), option
    resources = [group["rayStartParams"]["resources"] for group in rendered.cluster["workerGroupSpecs"]]
    replicas = [group["replicas"] for group in rendered.cluster["workerGroupSpecs"]]
    held = dict.fromkeys(("expertmesh_router", "expertmesh_expert", "expertmesh_gateway"), 0)
    for text, pods in zip(resources, replicas, strict=True):
        for kind, number in _resources(text).items():
            held[kind] += number * pods
    assert (config.routers, config.expert_workers, config.gateways) == tuple(held.values())


def _resources(text: str) -> dict[str, int]:
    return dict(json.loads(json.loads(text)))  # within quotes, as a shell and KubeRay's autoscaler read it
