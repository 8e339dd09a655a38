"""Starts the actors of a cluster and follows them until all are ready."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.config import Config
from cluster.errors import ExpertMeshError, StartError
from cluster.fleet import gateway, local_ray
from cluster.fleet.controller import NAME, NAMESPACE, Controller
from cluster.fleet.membership import View
from cluster.fleet.preflight import Plan
from cluster.fleet.router_actor import Router
from workers.actor import ExpertWorker
from workers.kernels.threads import process_environment

_POLL_S = 0.2
_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Handles of what runs. The actors live as long as this process: they are its children in Ray."""

    controller: Any
    actors: dict[str, Any]  # by id: expert workers and routers
    serving: Future[None]  # done when the gateways take requests

    def news(self, known_version: int) -> View:
        """The view, as soon as it is another than `known_version`, at the latest after a second. RayError."""
        view: View = ray.get(self.controller.watch.remote(known_version), timeout=_CALL_TIMEOUT_S)
        return view


def start_actors(config: Config, plan: Plan, url: str) -> Cluster:
    """Ask Ray for every process of the plan. Returns before they are ready."""
    controller = _actor(Controller, NAME, 1, max_concurrency=1000).remote(
        plan.n_layers, plan.n_experts, plan.workers, (*plan.workers, *plan.routers)
    )
    actors = {}
    for worker in plan.workers:
        actors[worker] = _actor(ExpertWorker, worker, plan.worker_threads).remote(
            worker, config, plan.checkpoint, plan.worker_threads, controller
        )
    for router in plan.routers:
        actors[router] = _actor(Router, router, plan.router_threads).remote(
            router, config, plan.checkpoint, plan.router_threads, controller
        )
    # Serve needs seconds of its own, which the loading of the model hides.
    pool = ThreadPoolExecutor(1, thread_name_prefix="serve")
    serving = pool.submit(gateway.deploy, config, plan.checkpoint, plan.model_name, url, controller)
    pool.shutdown(wait=False)
    return Cluster(controller, actors, serving)


def wait_ready(cluster: Cluster, show: Callable[[View], None]) -> None:
    """Return once every process is ready; `show` sees the view as it changes. StartError names who failed and why."""
    waiting = {actor.ready.remote(): name for name, actor in cluster.actors.items()}
    known = 0
    while True:
        done, _ = ray.wait(list(waiting), timeout=_POLL_S) if waiting else ([], [])
        for ref in done:
            name = waiting.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                raise StartError(f"{name} did not start: {reason(error)}") from error
        try:
            view = cluster.news(known)
        except RayError as error:
            raise StartError(f"the controller did not start: {reason(error)}") from error
        if view.version != known:
            known = view.version
            show(view)
        if not waiting and _is_serving(cluster.serving) and all(member.state == "ready" for member in view.members):
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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayActorError) and len(lines) > 1:
        exits = [line for line in lines if "exit" in line.lower()]
        return (exits or lines)[-1]
    return lines[-1] if lines else type(error).__name__


def _actor(cls: type, name: str, threads: int, **options: Any) -> Any:
    # A Ray of our own already has these variables for the expert workers. One that needs others costs each start of
    # the actor another half second, in which Ray's agent makes an environment for it.
    wanted = process_environment(threads).items()
    variables = {name: value for name, value in wanted if local_ray.inherited.get(name) != value}
    return ray.remote(cls).options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        runtime_env={"env_vars": variables} if variables else None,
        **options,
    )
