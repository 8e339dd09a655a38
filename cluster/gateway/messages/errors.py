"""Errors as Anthropic's clients know them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from cluster.errors import RequestError

PATH = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def envelope(error: RequestError) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


class Detail(BaseModel):
    type: str
    message: str


class Envelope(BaseModel):
    type: Literal["error"]
    error: Detail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Envelope, "description": "The request is at fault"},
    "5XX": {"model": Envelope, "description": "The server is at fault, or not ready"},
}
