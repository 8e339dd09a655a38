"""What happens to every request before a route sees it: its id, its key, its size; and its line in the metrics."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import RequestError
from cluster.gateway.bodies import read_body
from cluster.gateway.hosts import Hosts
from cluster.gateway.http_errors import ERROR_CODE, error_response
from cluster.gateway.keys import ApiKeys
from cluster.gateway.metrics import Metrics
from cluster.gateway.page import routes as page_routes
from cluster.gateway.tenants import tenant
from cluster.observe.context import request_id as request_ids
from cluster.observe.tracing import request_span

log = logging.getLogger(__name__)

# Probes, scrapers and the description of the API ask for no key; they show nothing of a request or an answer.
OPEN_PATHS = page_routes.OPEN_PATHS | frozenset(
    {"/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json", "/docs"}
)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
CLIENT_GONE = 499


class Front:
    """ASGI middleware. A body is read whole here, so that its size is known, however it is sent, before it is used.

    HEAD is answered as GET without a body, a path as the one without slashes at its end.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys | None, hosts: Hosts, max_body_bytes: int, metrics: Metrics):
        self._app = app
        self._hosts = hosts
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if _REQUEST_ID.fullmatch(request_id) is None:
            request_id = b"req_" + secrets.token_hex(12).encode()
        status, is_head = CLIENT_GONE, scope["method"] == "HEAD"
        path = scope["path"].rstrip("/") or "/"
        # A copy: the server counts the bytes of an answer by the method of its own.
        scope = {**scope, "path": path, "method": "GET" if is_head else scope["method"]}

        request_ids.set(request_id.decode("ascii"))  # of this task, which is this request's
        began = time.perf_counter()

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            elif is_head:
                message["body"] = b""
            await send(message)

        traceparent = headers.get(b"traceparent", b"").decode("latin-1")
        try:
            with request_span(scope["method"], traceparent, {"expertmesh.request_id": request_ids.get()}) as span:
                await self._handle(scope, headers, receive, send_counted)
                if span is not None:
                    route = getattr(scope.get("route"), "path", "other")
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attributes({"http.route": route, "http.response.status_code": status})
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            said = {"route": route, "status": status, "seconds": round(time.perf_counter() - began, 4)}
            log.log(logging.DEBUG if path in OPEN_PATHS else logging.INFO, "%s %s", scope["method"], route, extra=said)
            self._metrics.requests[route, str(status)] += 1
            if (code := scope.get(ERROR_CODE)) is not None:
                self._metrics.rejected[code] += 1

    async def _handle(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        try:
            self._hosts.check(headers.get(b"host", b""))
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers)
            body: bytes | None = b""
            if scope["method"] == "POST":  # no other route takes one
                body = await read_body(headers, receive, self._max_body_bytes)
        except RequestError as error:
            more = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            if error.status in (408, 413):  # the rest of the body stays unread: the connection is of no more use
                more = {"Connection": "close"}
            scope[ERROR_CODE] = error.code
            await error_response(error, scope["path"], more)(scope, receive, send)
            return
        if body is None:
            return
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._keys is None:
            return
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        if not authorization and (key := headers.get(b"x-api-key")):  # Anthropic's clients send it so
            authorization = f"Bearer {key.decode('latin-1')}"
        if (found := self._keys.tenant_of(authorization)) is None:
            message = "Incorrect API key" if authorization else "No API key: send `Authorization: Bearer KEY`"
            raise RequestError(message, code="invalid_api_key", status=401)
        tenant.set(found)  # of this task, as the id
