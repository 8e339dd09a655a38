"""What operators and their machines ask: is it alive, is it ready, which version, how is it doing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway import response_bodies
from cluster.gateway.context import Gateway
from cluster.observe.discovery import target_groups

_TEXT = {"schema": {"type": "string"}}


def service_routes(gateway: Gateway, version: str) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/health")
    async def health() -> response_bodies.Status:
        """200 while the process lives."""
        return response_bodies.Status(status="alive")

    @router.get("/ping")
    async def ping() -> response_bodies.Status:
        """The same, under the path that SageMaker asks."""
        return response_bodies.Status(status="alive")

    @router.get("/load")
    async def load() -> response_bodies.Load:
        """How many requests this gateway is answering."""
        return response_bodies.Load(server_load=gateway.metrics.n_requests)

    @router.get("/ready")
    async def ready() -> response_bodies.Status:
        """200 while a router is ready: its model loaded, its workers connected. One that leaves later is waited for."""
        if not gateway.session.ready():
            raise RequestError("No router is ready", code="not_ready", status=503, retry_after_s=1)
        return response_bodies.Status(status="ready")

    @router.get("/version")
    async def show_version() -> response_bodies.Version:
        """The version of this server."""
        return response_bodies.Version(version=version)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": _TEXT}}})
    async def metrics() -> Response:
        """The Prometheus series of all processes of the cluster: one target is enough."""
        return Response(await gateway.metrics.of_all(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @router.get("/metrics/targets")
    async def metrics_targets() -> list[dict[str, Any]]:
        """The endpoints of all processes, for Prometheus' HTTP discovery: instead of `/metrics`, not beside it."""
        return target_groups(gateway.metrics.targets, gateway.metrics.cluster)

    if gateway.config.info_endpoints:
        _add_info(router, gateway)
    return router


def _add_info(router: APIRouter, gateway: Gateway) -> None:
    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """The configuration; the name of the file of keys, never a key."""
        return {name: str(value) for name, value in asdict(gateway.config).items()}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What the chat template and the special tokens are."""
        return gateway.tokenizer.info()
