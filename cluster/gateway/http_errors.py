"""Every error in OpenAI's envelope, whoever found it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway.messages import errors as messages
from cluster.gateway.schemas.known import NEUTRAL
from cluster.observe.context import request_id

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}
_NOTHING_HERE = (
    "Nothing is served under this path. This server generates text, by POST to /v1/chat/completions, /v1/completions, "
    "/v1/responses or /v1/messages; it has no embeddings, scores, files or batches"
)
# Fields of several types: pydantic explains each type's failure, a client wants to know what is right.
_WANTED = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids; no list may be empty",
    "stop": "a text or a list of texts, none of them empty or too long",
}


_OBJECTS = ("model_type", "model_attributes_type", "dict_type")
ERROR_CODE = "expertmesh.error_code"  # in the ASGI scope of a request that was refused


def envelope(error: RequestError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request of `path`, in the envelope that its clients know."""
    more = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    # ASCII only: what a client sent may hold half a surrogate pair, which UTF-8 has no bytes for.
    body = json.dumps(messages.envelope(error) if path.startswith(messages.PATH) else envelope(error))
    return Response(body, error.status, {**(headers or {}), **more}, media_type="application/json")


def internal_error() -> RequestError:
    return RequestError("The server failed to answer this request", code="internal_error", status=500)


def install(app: FastAPI) -> None:
    """Answer every exception of `app` with an envelope."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refuse(request, error)

    def refuse(request: Request, error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
        request.scope[ERROR_CODE] = error.code
        return error_response(error, request.url.path, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refuse(request, explain(error.errors(), error.body))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        refusal = RequestError(_said(error), code=code, status=error.status_code)
        return refuse(request, refusal, error.headers)

    async def unforeseen(request: Request, _error: Exception) -> Response:
        log.error("%s %r failed", request.method, request.url.path)  # quoted: a path may hold the end of a line
        return refuse(request, internal_error(), {"x-request-id": request_id.get()})

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def _said(error: HTTPException) -> str:
    if error.status_code == 404:
        return _NOTHING_HERE
    allowed = (error.headers or {}).get("Allow")
    return f"This path takes {allowed} alone" if error.status_code == 405 and allowed else error.detail


def explain(errors: Sequence[Mapping[str, Any]], body: Any) -> RequestError:
    """One RequestError for what pydantic found: the first field at fault, at its deepest place."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(f"The body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if not isinstance(body, dict):
        message = "The body must be a JSON object, sent with Content-Type: application/json"
        return RequestError(message, code="invalid_json")
    root = first["loc"][1:2]
    paths = [(_path(error, body), error) for error in errors if error["loc"][1:2] == root]
    path, error = max(paths, key=lambda item: (item[1]["type"] == "value_error", len(item[0])))  # ours say most
    if not path:  # a name of a field that is no text
        return RequestError(f"The body: {error['msg']}", code="invalid_json")
    param = _dotted(path)
    if error["type"] == "missing":
        return _invalid(f"'{param}' is required", "missing_required_parameter", param)
    if NEUTRAL.intersection(part for part in path if isinstance(part, str)):
        return _invalid(f"'{param}' is not supported with this value", "unsupported_parameter", param)
    if path[0] in _WANTED and error["type"] != "value_error":
        return _invalid(f"'{path[0]}' must be {_WANTED[path[0]]}", "invalid_value", str(path[0]))
    if error["type"] in _OBJECTS:  # pydantic names our class
        return _invalid(f"'{param}' must be an object", "invalid_value", param)
    return _invalid(f"'{param}': {error['msg'].removeprefix('Value error, ')}", "invalid_value", param)


def refusal_of(error: ValidationError) -> RequestError:
    """One RequestError for a body that was translated into another which is not valid."""
    return explain([{**item, "loc": ("body", *item["loc"])} for item in error.errors()], {})


def _invalid(message: str, code: str, param: str) -> RequestError:
    return RequestError(message[:1000], code=code, param=param[:200] or None)


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The part of a pydantic location that leads through the body; the rest names types of a union."""
    path: list[str | int] = []
    location = error["loc"][1:]
    for i, part in enumerate(location):
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing" or i < len(location) - 1:  # the field that is missing ends its location
                continue
        path.append(part)
    return path


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
