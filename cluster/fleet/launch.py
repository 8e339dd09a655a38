"""Starts the actors of a cluster and follows them until all are ready."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.config import Config
from cluster.control.admin_options import AdminOptions
from cluster.control.client import NAME, NAMESPACE, ControllerByName
from cluster.control.controller import Controller
from cluster.control.metrics_options import MetricsOptions
from cluster.control.rebalancer import RebalanceOptions
from cluster.control.view import View
from cluster.errors import ExpertMeshError, RayGone, StartError
from cluster.fleet import gateway
from cluster.fleet.actor import node_address
from cluster.fleet.expert_actor import ExpertWorker
from cluster.fleet.preflight import Plan
from cluster.fleet.router_actor import Router
from cluster.gateway.context import ModelCard
from workers import device
from workers.kernels.threads import process_environment
from workers.transport.grpc.credentials import Credentials

_TICK_S = 0.1
_FURTHER = "For further information visit"  # pydantic's last line
_CALL_TIMEOUT_S = 10.0
_FIRST_CALL_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Cluster:
    """Handles of what runs. The actors live as long as this process: they are its children in Ray."""

    controller: Any
    actors: dict[str, Any]  # by id: expert workers and routers
    serving: Future[None]  # done when the gateways take requests
    start_worker: Callable[[str], Any]  # asks Ray for one more expert worker; its handle
    workers: set[str]  # ids of the expert workers among `actors`
    _call: Any = None
    _asked: float = 0.0
    _known: int = 0

    def news(self, timeout_s: float) -> View | None:
        """The view: at once when it changed, else about once a second, else None after `timeout_s`. RayGone."""
        if self._call is None:
            self._call, self._asked = (
                self.controller.watch.remote(self._known, tuple(sorted(self.workers))),
                time.monotonic(),
            )
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
        return view

    def follow(self, view: View) -> None:
        """Start the expert workers that the controller wants and there are not, and end those it does not want."""
        for worker in sorted(set(view.wanted) - self.workers):
            self.actors[worker] = self.start_worker(worker)
            self.workers.add(worker)
        for worker in sorted(self.workers - set(view.wanted)) if view.wanted else ():
            ray.kill(self.actors.pop(worker), no_restart=True)
            self.workers.discard(worker)

    def drain(self) -> None:
        """Let the gateways refuse new requests. RayGone."""
        try:
            ray.get(self.controller.drain.remote(), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            raise RayGone(reason(error)) from error


def start_actors(config: Config, plan: Plan, url: str, credentials: Credentials, admin_token: str) -> Cluster:
    """Ask Ray for every process of the plan. Returns before they are ready."""
    own_ray = config.ray_address is None
    holders = plan.workers or plan.routers  # with the local transport the router holds its experts itself
    controller = _actor(Controller, NAME, 1, own_ray, max_concurrency=1000).remote(
        plan.n_layers,
        plan.n_experts,
        holders,
        (*plan.workers, *plan.routers),
        plan.dense_layers,
        plan.expert_bytes,
        AdminOptions(node_address(), config.admin_port, admin_token),
        RebalanceOptions(
            config.rebalance, config.rebalance_interval_s, config.rebalance_horizon_s, config.rebalance_min_gain
        ),
        MetricsOptions(node_address(), config.metrics_port, config.per_expert_metrics == "on"),
        config.spare_replicas,
        config.allow_chaos,
    )
    by_name = ControllerByName()
    actors: dict[str, Any] = {}

    def start_worker(worker: str) -> Any:
        actor = _actor(ExpertWorker, worker, plan.worker_threads, own_ray, gpus=config.gpus_per_expert_worker)
        return actor.remote(worker, config, plan.checkpoint, plan.worker_threads, by_name, credentials)

    for worker in plan.workers:
        actors[worker] = start_worker(worker)
    for router in plan.routers:
        actors[router] = _actor(Router, router, plan.router_threads, own_ray, gpus=config.gpus_per_router).remote(
            router, config, plan.checkpoint, plan.router_threads, by_name, credentials
        )
    model = ModelCard(
        plan.model_name, plan.checkpoint, plan.max_context, plan.vocab_size, int(time.time()), plan.defaults
    )
    # Serve needs seconds of its own, which the loading of the model hides.
    serving: Future[None] = Future()

    def deploy() -> None:
        try:
            gateway.deploy(config, model, url, by_name, credentials)
        except Exception as error:
            serving.set_exception(error)
        else:
            serving.set_result(None)

    # A daemon: when the start is given up, nobody waits for what Serve was doing.
    threading.Thread(target=deploy, name="serve", daemon=True).start()
    return Cluster(controller, actors, serving, start_worker, set(plan.workers))


def wait_ready(cluster: Cluster, show: Callable[[View], None], check: Callable[[], None]) -> None:
    """Return once every process is ready. StartError names who failed and why.

    `show` sees each view, `check` is called often and may raise.
    """
    waiting = {actor.ready.remote(): name for name, actor in cluster.actors.items()}
    while True:
        check()
        done, _ = ray.wait(list(waiting), timeout=0) if waiting else ([], [])
        for ref in done:
            name = waiting.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                raise StartError(f"{name} did not start: {reason(error)}") from error
        serving = _is_serving(cluster.serving)
        try:
            view = cluster.news(_TICK_S)
        except RayGone as error:
            raise StartError(f"the controller did not start: {error}") from error
        if view is not None:
            show(view)
            if serving and not waiting and all(member.state == "ready" for member in view.members):
                return


def _is_serving(serving: Future[None]) -> bool:
    try:
        serving.result(timeout=0)
    except NotYet:
        return False
    except Exception as error:
        raise StartError(f"the gateway did not start: {reason(error)}") from error
    return True


def reason(error: Exception) -> str:
    """The cause of an error that Ray wrapped, in one line."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        cause = error.cause
        return str(cause) if isinstance(cause, ExpertMeshError) else f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and _FURTHER not in line]
    if isinstance(error, RayActorError) and len(lines) > 1:
        exits = [line for line in lines if "exit" in line.lower()]
        return (exits or lines)[-1]
    return lines[-1] if lines else type(error).__name__


def _actor(cls: type, name: str, threads: int, own_ray: bool, gpus: float = 0.0, **options: Any) -> Any:
    # A Ray of our own was started with these variables, so its processes have them: an environment of the actor's own
    # would cost each start half a second, and where a path has a space in it Ray's agent never gets it ready.
    variables = {} if own_ray else process_environment(threads) | (device.ENVIRONMENT if gpus else {})
    return ray.remote(cls).options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=0,
        num_gpus=gpus or None,
        max_restarts=-1,
        runtime_env={"env_vars": variables} if variables else None,
        **options,
    )
