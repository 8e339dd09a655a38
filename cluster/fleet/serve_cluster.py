"""What the Serve application asks for: the cluster of a configuration in the Ray that it runs in, made once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve

from cluster.config import Config
from cluster.config_load import load, tls_files
from cluster.control.client import NAME, NAMESPACE
from cluster.errors import PlacementError, StartError
from cluster.fleet import gateway, node_gpus, preflight
from cluster.fleet.launch import autoscale_options, launcher_of, start_controller
from cluster.fleet.launcher import RayLauncher
from cluster.fleet.ray_errors import reason
from cluster.fleet.run_state import new_token, read_token
from cluster.fleet.serve import base_url
from cluster.models import resolve
from cluster.state_dir import settle
from workers.transport.grpc.credentials import Credentials

# What may be another in a cluster that runs.
_SIZES = ("expert_workers", "routers", "gateways")
_BOUNDS = ("min_routers", "max_routers", "min_expert_workers", "max_expert_workers")


def application(given: Mapping[str, Any]) -> serve.Application:
    """The gateways of the cluster that `given` and the environment describe; its controller runs from now on.

    A cluster that runs already is scaled. Raises ConfigError, StartError, and CheckpointError for what cannot be, and
    for another configuration than that of the cluster that runs: what runs goes on then.
    """
    address = str(ray.get_runtime_context().gcs_address)
    config = load({**given, "ray_address": address}, os.environ).config
    settle(os.environ, config.state_dir)
    launcher = _scaled(config) if _exists() else _started(config)
    n = config.gateways
    return gateway.application(launcher.config, launcher.model, launcher.url, launcher.credentials, n)


def _exists() -> bool:
    try:
        ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        return False
    return True


def _started(config: Config) -> RayLauncher:
    checkpoint = resolve(config.model)
    plan = preflight.plan(config, checkpoint, node_gpus.found(config))
    preflight.check_gateway(config, checkpoint, plan.vocab_size)
    credentials = Credentials.generate(tls_files(config), config.trusted_network)
    token = new_token() if config.admin_token_file is None else read_token(config.admin_token_file)
    launcher = replace(launcher_of(plan, base_url(config), credentials), asked=config, n_gateways=config.gateways)
    start_controller(plan, launcher, token, detached=True)
    return launcher


def _scaled(config: Config) -> RayLauncher:
    """The cluster that runs, with as many processes as `config` says."""
    controller: Any = ray.get_actor(NAME, NAMESPACE)
    launcher: RayLauncher = ray.get(controller.launched.remote())
    if launcher.asked is None:
        raise StartError("this Ray runs an ExpertMesh that `expertmesh serve` started")
    if others := _differences(launcher.asked, config):
        raise StartError(f"{', '.join(others)} cannot be changed while the cluster runs: that takes a new Ray cluster")
    try:
        bounds = autoscale_options(config)
        ray.get(controller.limit.remote(bounds.routers, bounds.workers))
        ray.get(controller.scale.remote(config.expert_workers, config.routers))
        ray.get(controller.declare_gateways.remote(config.gateways))
    except ray.exceptions.RayError as error:
        raise PlacementError(reason(error)) from error
    return launcher


def _differences(before: Config, now: Config) -> list[str]:
    then, wanted = asdict(before), asdict(now)
    return [name for name in then if name not in (*_SIZES, *_BOUNDS) and then[name] != wanted[name]]
