"""gRPC's health check (grpc.health.v1.Health/Check), which probes and load balancers ask."""

from __future__ import annotations

from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from workers.transport.grpc.unary import Refused

HEALTH_METHOD = "/grpc.health.v1.Health/Check"


class Health:
    """One answer for the whole server, which is the empty name, and for `service`."""

    def __init__(self, service: str) -> None:
        self.is_serving = False
        self._names = ("", service)

    def check(self, message: bytes) -> bytes:
        """The method. Raises Refused for a service that is not there."""
        service = HealthCheckRequest.FromString(message).service
        if service not in self._names:
            raise Refused(StatusCode.NOT_FOUND, f"service {service!r} is not served here")
        status = HealthCheckResponse.SERVING if self.is_serving else HealthCheckResponse.NOT_SERVING
        reply: bytes = HealthCheckResponse(status=status).SerializeToString()
        return reply
