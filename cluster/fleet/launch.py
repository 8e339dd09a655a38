"""Asks for a cluster: starts its controller, which starts all else, and follows it until all are ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from cluster.config import Config
from cluster.control.autoscale import AutoscaleOptions, Limits
from cluster.control.client import NAME, NAMESPACE
from cluster.control.controller import Controller
from cluster.control.goal import Processes
from cluster.control.options import AdminOptions, MetricsOptions, Options
from cluster.control.rebalancer import RebalanceOptions
from cluster.control.view import GATEWAYS, View
from cluster.errors import RayGone, StartError
from cluster.fleet.launcher import EXPERT_RESOURCE, ROUTER_RESOURCE, Kind, RayLauncher
from cluster.fleet.preflight import Plan
from cluster.fleet.ray_errors import reason
from cluster.gateway.context import ModelCard
from cluster.placement.placement import striped
from workers import device
from workers.kernels.threads import process_environment
from workers.transport.grpc.credentials import Credentials

_TICK_S = 0.1
_CALL_TIMEOUT_S = 10.0
_FIRST_CALL_TIMEOUT_S = 60.0
_HEAD = {"node:__internal_head__": 0.001}  # Ray's name for its head node: no autoscaler takes that away


@dataclass(slots=True)
class Cluster:
    """A controller that runs, and what it says."""

    controller: Any
    _call: Any = None
    _asked: float = 0.0
    _known: int = 0
    _process: psutil.Process | None = None  # the controller's, where it is of this node

    def news(self, timeout_s: float) -> View | None:
        """The view: at once when it changed, else about once a second, else None after `timeout_s`. RayGone."""
        if self._call is None:
            self._call, self._asked = self.controller.watch.remote(self._known), time.monotonic()
        try:
            done, _ = ray.wait([self._call], timeout=timeout_s)
            if not done:
                # Its first answer waits until its process has started, beside all others.
                if time.monotonic() - self._asked > (_CALL_TIMEOUT_S if self._known else _FIRST_CALL_TIMEOUT_S):
                    raise RayGone("the controller does not answer")
                return None
            view: View = ray.get(self._call)
        except (RayError, RayGone) as error:
            self._call = None
            raise RayGone(reason(error)) from error
        self._call, self._known = None, view.version
        self._remember(view)
        return view

    def end_controller(self) -> bool:
        """Kill its process, if it is there and of this node: one that hangs, since Ray starts only what ended."""
        if self._process is None:
            return False
        try:
            self._process.kill()
        except psutil.Error:
            return False
        return True

    def _remember(self, view: View) -> None:
        node = ray.get_runtime_context().get_node_id()
        mine = next((m.pid for m in view.members if m.role == "controller" and m.node == node), None)
        if mine is not None and (self._process is None or self._process.pid != mine):
            with suppress(psutil.Error):
                self._process = psutil.Process(mine)

    def drain(self) -> None:
        """Let the gateways refuse new requests. RayGone."""
        try:
            ray.get(self.controller.drain.remote(), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            raise RayGone(reason(error)) from error


def launcher_of(plan: Plan, url: str, credentials: Credentials) -> RayLauncher:
    """What the processes of a plan are made of; `url` is where clients reach the gateways."""
    model = ModelCard(
        plan.model_name, plan.checkpoint, plan.max_context, plan.vocab_size, int(time.time()), plan.defaults
    )
    return RayLauncher(plan.config, plan.checkpoint, *_kinds(plan.config, plan), url, model, credentials)


def start_controller(plan: Plan, launcher: RayLauncher, admin_token: str, *, detached: bool = False) -> Cluster:
    """Start the controller of the plan, which starts everything else. Returns before it has.

    It ends with this process, unless it is `detached`.
    """
    config = plan.config
    holders = plan.workers or plan.routers  # with the local transport the router holds its experts itself
    spares = min(config.spare_replicas, len(holders) - 1)
    placement = striped(plan.n_layers, plan.n_experts, holders, dense_layers=plan.dense_layers, spares=spares)
    options = Options(
        admin=AdminOptions(config.admin_host, config.admin_port, admin_token),
        metrics=MetricsOptions(
            "", config.metrics_port, config.per_expert_metrics == "on", config.log_level, config.log_format
        ),
        rebalance=RebalanceOptions(
            config.rebalance if plan.workers else "off",
            config.rebalance_interval_s,
            config.rebalance_horizon_s,
            config.rebalance_min_gain,
        ),
        autoscale=autoscale_options(config),
        max_sequences=min(config.max_sequences, config.max_batch_tokens),
        expert_bytes=plan.expert_bytes,
        process_bytes=plan.process_bytes,
        spare_replicas=config.spare_replicas,
        allow_chaos=config.allow_chaos,
        drain_timeout_s=config.drain_timeout_s,
    )
    actor: Any = ray.remote(Controller)
    controller = actor.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached" if detached else None,
        num_cpus=0,
        resources=_HEAD,
        max_restarts=-1,
        max_concurrency=1000,
    ).remote(placement, Processes(plan.workers, plan.routers, config.gateways), launcher, options)
    return Cluster(controller)


def autoscale_options(config: Config) -> AutoscaleOptions:
    """When and how far pools grow and shrink."""
    n_workers = int(config.expert_workers or 0)
    return AutoscaleOptions(
        mode=config.autoscale,
        routers=Limits(config.min_routers, config.max_routers or max(config.min_routers, config.routers)),
        workers=Limits(
            config.min_expert_workers, config.max_expert_workers or max(config.min_expert_workers, n_workers)
        ),
        interval_s=config.autoscale_interval_s,
        window_s=config.autoscale_window_s,
        idle_s=config.autoscale_idle_s,
        cooldown_s=config.autoscale_cooldown_s,
        queue=config.autoscale_queue,
        kv_use=config.autoscale_kv_use,
        worker_use=config.autoscale_worker_use,
        worker_waiting=config.autoscale_worker_waiting,
    )


def _kinds(config: Config, plan: Plan) -> tuple[Kind, Kind]:
    """Of routers and of expert workers."""

    def kind(resource: str, cpus: float, gpus: float, threads: int) -> Kind:
        # A Ray of our own was started with these variables, so its processes have them: an environment of the actor's
        # own would cost each start half a second, and where a path has a space in it Ray's agent never gets it ready.
        own_ray = config.ray_address is None
        variables = {} if own_ray else process_environment(threads) | (device.ENVIRONMENT if gpus else {})
        return Kind(resource, cpus, gpus, threads, variables)

    return (
        kind(ROUTER_RESOURCE, config.cpus_per_router, config.gpus_per_router, plan.router_threads),
        kind(EXPERT_RESOURCE, config.cpus_per_expert_worker, config.gpus_per_expert_worker, plan.worker_threads),
    )


def wait_ready(cluster: Cluster, show: Callable[[View], None], check: Callable[[], None]) -> None:
    """Return once every process is ready. StartError names who failed and why.

    `show` sees each view, `check` is called often and may raise.
    """
    while True:
        check()
        try:
            view = cluster.news(_TICK_S)
        except RayGone as error:
            raise StartError(f"the controller did not start: {error}") from error
        if view is None:
            continue
        show(view)
        for who, why in sorted(view.failures.items()):
            raise StartError(f"{'the gateway' if who == GATEWAYS else who} did not start: {why}")
        states = {member.id: member.state for member in view.members}
        if view.serving and view.goal.processes.ids <= states.keys() and set(states.values()) == {"ready"}:
            return
