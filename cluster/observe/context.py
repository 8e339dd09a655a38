"""What belongs to the HTTP request that a gateway's task works on."""

from __future__ import annotations

from contextvars import ContextVar

#: Its id: the client's `x-request-id`, or one of our own; "" outside of a request.
request_id: ContextVar[str] = ContextVar("request_id", default="")
