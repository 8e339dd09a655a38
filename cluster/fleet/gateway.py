"""The gateway on Ray Serve: the OpenAI application, a session over all routers, and how it ends in good order."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from cluster.config import Config
from cluster.control.client import ControllerByName, ControllerClient
from cluster.control.view import Member, View
from cluster.fleet.actor import node_address
from cluster.fleet.drain import Drain
from cluster.fleet.local_ray import APPLICATION
from cluster.fleet.request_id import OneRequestId
from cluster.gateway.context import ModelCard
from workers.transport.grpc.credentials import Credentials

DEPLOYMENT = "gateway"  # its name in the application
_LEAVING_S = 600.0  # for the requests of a gateway that leaves
_POLL_S = 0.05


class Gateway:
    """One replica of the Serve deployment."""

    async def __init__(  # type: ignore[misc]
        self, config: Config, model: ModelCard, url: str, controller: Any, credentials: Credentials
    ) -> None:
        from cluster.gateway.app import create_app
        from cluster.gateway.metrics import Metrics
        from cluster.gateway.session import Session
        from cluster.gateway.tokenizer import Tokenizer

        self._metrics_url = f"{url}/metrics/own"
        _listen_on_node_address()
        _tell_when_listening(self._on_listening)
        self._id = self._rank()
        self._url = url
        self._node = ray.get_runtime_context().get_node_id()
        self._session = Session(credentials, rejoin_timeout_s=config.rejoin_timeout_s)
        tokenizer = await asyncio.to_thread(Tokenizer, Path(model.path))
        self._metrics = Metrics(self._id)
        app = create_app(config, model, tokenizer, self._session, self._metrics)
        self._drain = Drain(app, lambda: self._membership.tell())
        self._membership = ControllerClient(controller, self._member, self._on_view)
        # Until then Serve has no gateway: who waits for the application waits until it can answer.
        while not self._session.ready():  # noqa: ASYNC110 (it says nothing of itself)
            await asyncio.sleep(_POLL_S)

    def _rank(self) -> str:
        """`gateway-N`, where N may become less when others leave."""
        return f"gateway-{serve.get_replica_context().rank.rank}"

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._drain

    def _on_listening(self, host: str, port: int) -> None:
        """This gateway's own server, past the proxy: what it counts is not what the others count."""
        self._metrics_url = f"http://{host}:{port}/metrics/own"

    def _on_view(self, view: View) -> None:
        self._session.update(view.addresses("router"))
        self._metrics.peers = {
            member.id: member.metrics_url
            for member in view.members
            if member.role == "gateway" and member.id != self._id and member.state != "lost" and member.metrics_url
        }
        self._drain.draining |= view.draining  # a controller that was restarted no longer knows

    def _member(self) -> Member:
        self._id = self._rank()
        ready = not self._drain.draining and self._session.ready()
        stats = self._session.stats()
        return Member(
            role="gateway",
            id=self._id,
            pid=os.getpid(),
            node=self._node,
            state="draining" if self._drain.draining else "ready" if ready else "starting",
            address=self._url,
            metrics_url=self._metrics_url,
            detail={"open": self._drain.open, "requests": stats.requests, "tokens": stats.tokens},
        )


def application(config: Config, model: ModelCard, url: str, credentials: Credentials, n: int) -> serve.Application:
    """The Serve application of `n` gateways, for a controller that is found by its name."""
    deployment: Any = serve.deployment(
        serve.ingress()(Gateway),
        name=DEPLOYMENT,
        num_replicas=n,
        max_ongoing_requests=100_000,  # the routers' queues are the limit
        ray_actor_options={"num_cpus": 0},
        # When a cluster is stopped, requests were drained before. A gateway that leaves one that runs has its own yet.
        graceful_shutdown_timeout_s=_LEAVING_S if config.ray_address is None else config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1.0,
    )
    bound: serve.Application = deployment.bind(config, model, url, ControllerByName(), credentials)
    return bound


def scale(config: Config, model: ModelCard, url: str, credentials: Credentials, n: int) -> None:
    """Let there be `n` gateways, and Serve, if there is none; return once it takes requests. Raises what a gateway
    died of."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if is_deployed():
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
        deployment = import_module("ray.serve._private.common").DeploymentID(name=DEPLOYMENT, app_name=APPLICATION)
        ray.get(controller.update_deployment_replicas.remote(deployment, n))
        return
    quiet = {"log_level": config.log_level.upper(), "enable_access_log": False}
    # In a Ray of our own this is where Serve's own servers are; HAProxy listens on `config.host` (fleet.haproxy_exec).
    host = node_address() if config.ray_address is None else config.host
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": config.port}, logging_config=quiet)
    serve.run(
        application(config, model, url, credentials, n),
        name=APPLICATION,
        route_prefix="/",
        logging_config=quiet,
        external_scaler_enabled=True,  # the controller is the one who says how many there are
    )


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


def _tell_when_listening(told: Callable[[str, int], None]) -> None:
    """Call `told` with host and port once Serve has opened this replica's own HTTP server, as it does for HAProxy.

    The port is drawn after the constructor, and a replica is not told it.
    """
    replica = import_module("ray.serve._private.replica")
    original = replica.start_asgi_http_server

    async def start(app: ASGIApp, options: Any, *args: Any, **kwargs: Any) -> Any:
        options.middlewares.append(Middleware(OneRequestId))  # around Serve's own
        server = await original(app, options, *args, **kwargs)
        told(options.host, options.port)
        return server

    replica.__dict__["start_asgi_http_server"] = start
