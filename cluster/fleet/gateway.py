"""The gateway on Ray Serve: the OpenAI application, a session over all routers, and how it ends in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from importlib import import_module
from typing import Any

import ray
from ray import serve
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from cluster.config import Config
from cluster.control.client import ControllerByName, ControllerClient
from cluster.control.view import Member, State, View
from cluster.fleet.actor import checkpoint_here, node_address
from cluster.fleet.drain import Drain
from cluster.fleet.local_ray import APPLICATION
from cluster.fleet.metrics import aliases_of
from cluster.fleet.page_source import ControllerSource
from cluster.fleet.request_id import OneRequestId
from cluster.gateway.context import ModelCard
from cluster.observe import endpoint, logs, tracing
from cluster.observe.process import ProcessReadings
from workers.transport.grpc.credentials import Credentials

DEPLOYMENT = "gateway"  # its name in the application
_LEAVING_S = 600.0  # for the requests of a gateway that leaves
_POLL_S = 0.05
# For how long a thread keeps the interpreter that another waits for. The loop gives it away with every message it reads
# or writes, and would get it back 5 ms later, Python's default, as often as that while a large body is read beside it.
_TURN_S = 0.0005


class Gateway:
    """One replica of the Serve deployment."""

    async def __init__(  # type: ignore[misc]
        self, config: Config, model: ModelCard, url: str, controller: Any, credentials: Credentials
    ) -> None:
        from cluster.gateway.app import create_app
        from cluster.gateway.metrics import Metrics, of_session
        from cluster.gateway.session import Session
        from cluster.gateway.tokenizer import Tokenizer

        _listen_on_node_address()
        _keep_request_ids()
        self._id = self._rank()
        logs.configure(config.log_level, config.log_format, self._id)
        tracing.configure(config.otlp_traces_endpoint, self._id, config.cluster_name or "")
        self._url = url
        self._node = ray.get_runtime_context().get_node_id()
        self._session = Session(credentials, rejoin_timeout_s=config.rejoin_timeout_s, prefix_cache=config.prefix_cache)
        tokenizer = await asyncio.to_thread(lambda: Tokenizer(checkpoint_here(model.path, config.model)))
        process = ProcessReadings("gateway", lambda: self._epoch)
        own = (lambda: of_session(self._session.stats()), process)
        self._metrics = Metrics(self._id, own, aliases_of(config, self._id))
        self._metrics.cluster = config.cluster_name or ""
        self._epoch = 0
        app = create_app(config, model, tokenizer, self._session, self._metrics, ControllerSource(controller))
        sys.setswitchinterval(_TURN_S)
        gc.freeze()  # garbage collections, in which nothing else runs, need not look at what stays
        self._drain = Drain(app, lambda: self._membership.tell())
        collector, state = self._metrics.collector, lambda: self._state
        self._metrics_url = endpoint.serve(collector, node_address(), config.metrics_port, state)
        self._membership = ControllerClient(controller, self._member, self._on_view)
        # Until then Serve has no gateway: who waits for the application waits until it can answer.
        while not self._session.ready():  # noqa: ASYNC110 (it says nothing of itself)
            await asyncio.sleep(_POLL_S)

    def _rank(self) -> str:
        """`gateway-N`, where N may become less when others leave."""
        return f"gateway-{serve.get_replica_context().rank.rank}"

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._drain

    def _on_view(self, view: View) -> None:
        self._session.update(view.addresses("router"))
        self._metrics.targets = view.targets()
        self._epoch = view.placement.epoch
        self._drain.draining |= view.draining  # a controller that was restarted no longer knows

    @property
    def _state(self) -> State:
        if self._drain.draining:
            return "draining"
        return "ready" if self._session.ready() else "starting"

    def _member(self) -> Member:
        self._id = self._rank()
        self._metrics.rename(self._id)
        stats = self._session.stats()
        detail: dict[str, object] = {"open": self._drain.open, "requests": stats.requests, "tokens": stats.tokens}
        detail |= self._session.waits()
        return Member(
            role="gateway",
            id=self._id,
            pid=os.getpid(),
            node=self._node,
            state=self._state,
            address=self._url,
            metrics_url=self._metrics_url,
            detail=detail,
        )


def application(
    config: Config, model: ModelCard, url: str, credentials: Credentials, n: int, leaving_s: float = _LEAVING_S
) -> serve.Application:
    """The Serve application of `n` gateways, for a controller that is found by its name.

    leaving_s: for the requests that a gateway has when it is to end.
    """
    deployment: Any = serve.deployment(
        serve.ingress()(Gateway),
        name=DEPLOYMENT,
        num_replicas=n,
        max_ongoing_requests=100_000,  # the routers' queues are the limit
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=leaving_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1.0,
    )
    bound: serve.Application = deployment.bind(config, model, url, ControllerByName(), credentials)
    return bound


def deploy(config: Config, model: ModelCard, url: str, credentials: Credentials, n: int) -> None:
    """Start Serve and `n` gateways; return once they take requests. Raises what a gateway died of."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": config.log_level.upper(), "enable_access_log": False}
    quiet["encoding"] = "JSON" if config.log_format == "json" else "TEXT"
    # In a Ray of our own this is where Serve's own servers are; HAProxy listens on `config.host` (fleet.haproxy_exec).
    host = node_address() if config.ray_address is None else config.host
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": config.port}, logging_config=quiet)
    # In a Ray that we joined Serve is shut down with the cluster, which waits for requests that outlived the drain.
    leaving_s = _LEAVING_S if config.ray_address is None else config.drain_timeout_s
    serve.run(
        application(config, model, url, credentials, n, leaving_s),
        name=APPLICATION,
        route_prefix="/",
        logging_config=quiet,
        external_scaler_enabled=True,  # the controller is the one who says how many there are
    )


def scale(n: int) -> None:
    """Let there be `n` gateways, soon."""
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
    deployment = import_module("ray.serve._private.common").DeploymentID(name=DEPLOYMENT, app_name=APPLICATION)
    ray.get(controller.update_deployment_replicas.remote(deployment, n))


def is_deployed() -> bool:
    """Whether Serve has gateways, ready or not."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
    except ValueError:
        return False
    return APPLICATION in serve.status().applications


def _listen_on_node_address() -> None:
    """Bind the gRPC server that every Serve replica opens to the address Ray uses, not to every interface.

    It has no setting, and nothing here calls it. Serve opens it after this constructor.
    """
    replica = import_module("ray.serve._private.replica")
    original, host = replica.add_port_to_grpc_server, node_address()
    replica.__dict__["add_port_to_grpc_server"] = lambda server, address: original(
        server, address.replace("[::]", host)
    )


def _keep_request_ids() -> None:
    """Of the HTTP server that Serve opens for this replica: of two request ids in an answer ours stays."""
    replica = import_module("ray.serve._private.replica")
    original = replica.start_asgi_http_server

    async def start(app: ASGIApp, options: Any, *args: Any, **kwargs: Any) -> Any:
        options.middlewares.append(Middleware(OneRequestId))  # around Serve's own
        return await original(app, options, *args, **kwargs)

    replica.__dict__["start_asgi_http_server"] = start
