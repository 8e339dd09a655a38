"""Would catch options of the Serve application that `expertmesh serve` does not know or would refuse, and pools that
hold another number of processes than the application asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from cluster.config_load import FIELDS, load
from cluster.plan.gpu_types import GPU_TYPES
from cluster.plan.known_models import spec_of_model
from cluster.plan.model_size import ModelSize
from cluster.plan.ours import Layout, Load
from cluster.plan.show import chart_values
from tests.certificates import Authority
from tests.deploy import kuberay
from tests.deploy.rendering import CASES, case, render
from tests.reference import save_random


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


def test_values_of_a_plan_are_values_of_the_chart(tmp_path: Path) -> None:
    """For a short name, a hub id and a directory, in one pod and in many: taken as they are, a GPU for each process."""
    save_random(tmp_path / "mine")
    local = str(tmp_path / "mine")
    for model in ("mixtral-8x7b", "mistralai/Mixtral-8x22B-v0.1", local):
        size = ModelSize(spec_of_model(model))
        for layout in (Layout(size, GPU_TYPES["h100"], 2, 6), Layout(size, GPU_TYPES["a10g"], 2, 5)):
            file = tmp_path / "values.yaml"
            file.write_text(chart_values(layout, Load(64, 4096), model))
            rendered = render("-f", file)
            assert (rendered.arguments["routers"], rendered.arguments["expert_workers"]) == (2, layout.n_workers)
            groups = rendered.cluster["workerGroupSpecs"]
            limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
            gpus = [limit["nvidia.com/gpu"] * group["replicas"] for limit, group in zip(limits, groups, strict=True)]
            assert sum(gpus) == layout.n_gpus


def _resources(text: str) -> dict[str, int]:
    return dict(json.loads(json.loads(text)))  # within quotes, as a shell and KubeRay's autoscaler read it
