"""The live page of the cluster: its files, its stream, and an operator's verbs for who has the admin key."""

from __future__ import annotations

import json
import re

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.errors import RequestError
from cluster.gateway.page import assets
from cluster.gateway.page.feed import Feed, Source
from cluster.gateway.sse import EventStream, error_event

#: They show nothing of the cluster, so they ask for no key; the stream and the verbs do.
OPEN_PATHS = frozenset({"/", *(f"/page/{name}" for name in assets.names())})
_VERBS = re.compile(r"rebalance|placement/(move|replicate|drop)|workers/[A-Za-z0-9_.-]{1,64}/(drain|undrain)")
_KEY = "x-admin-key"


def page_routes(feed: Feed, source: Source) -> APIRouter:
    """Not part of the API that others program against, so not in its description."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index(request: Request) -> Response:
        return assets.answer(assets.INDEX, request.headers.get("if-none-match"))

    @router.get("/page/{name}")
    async def asset(name: str, request: Request) -> Response:
        if name not in assets.names():
            raise RequestError("There is no such file", code="not_found", status=404)
        return assets.answer(name, request.headers.get("if-none-match"))

    @router.get("/live")
    async def live() -> Response:
        """Server-sent events: the state of the cluster, then its changes."""
        return EventStream(feed.follow(), done=b"", error=error_event)

    @router.post("/live/operate/{verb:path}")
    async def operate(verb: str, request: Request) -> Response:
        """Hand a verb to the admin API with the key that came with it: that one decides.

        The key has a header of its own, which no other site's page can send without being allowed to.
        """
        key = request.headers.get(_KEY, "")
        if not key:
            raise RequestError(f"This needs the admin key, in the header {_KEY}", code="invalid_api_key", status=401)
        if _VERBS.fullmatch(verb) is None:
            raise RequestError("There is no such verb", code="not_found", status=404)
        try:
            body = json.loads(await request.body() or b"{}")
        except ValueError as error:
            raise RequestError(f"The body is not JSON: {error}", code="invalid_json") from error
        status, answer = await source.operate(f"/{verb}", body, key)
        return JSONResponse(answer, status)

    return router
