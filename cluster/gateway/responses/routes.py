"""OpenAI's Responses API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway import response_bodies
from cluster.gateway.context import Gateway
from cluster.gateway.conversation import converse
from cluster.gateway.generation import respond
from cluster.gateway.http_errors import refusal_of
from cluster.gateway.json_bodies import JsonRoute
from cluster.gateway.offload import give_way
from cluster.gateway.responses.form import Item, ResponseForm
from cluster.gateway.responses.schemas import ResponsesRequest
from cluster.gateway.responses.store import ResponseStore, Stored
from cluster.gateway.responses.translate import chat_request


def response_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)
    store = ResponseStore()

    @router.post("/responses", response_model=response_bodies.AnyObject, responses=response_bodies.STREAM)
    async def create(body: ResponsesRequest) -> Response:
        """Answer, and remember the conversation unless `store` is false."""
        await give_way()
        gateway.check_model(body.model)
        gateway.check_unknown(body)
        before = body.previous_response_id
        past = [] if before is None else store.get(before, "previous_response_id").messages
        try:
            request, told = chat_request(body, past)
        except ValidationError as error:
            raise refusal_of(error) from error
        await give_way()
        try:
            conversation = await converse(gateway, request, logprobs=body.n_logprobs)
        except RequestError as error:
            error.param = _NAMES.get(error.param or "", error.param)
            raise

        def keep(whole: Item) -> None:
            if body.store is not False:
                store.put(Stored(whole, [*told, *_as_messages(whole["output"])]))

        form = ResponseForm(gateway, body, keep)
        return respond(gateway, conversation.choices, 1, form, stream=bool(body.stream), usage=True)

    @router.get("/responses/{response_id}", response_model=response_bodies.AnyObject)
    async def get(response_id: str) -> dict[str, Any]:
        """A response that this gateway still has."""
        return store.get(response_id).response

    @router.delete("/responses/{response_id}", response_model=response_bodies.AnyObject)
    async def delete(response_id: str) -> dict[str, Any]:
        """Forget a response."""
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
}


def _as_messages(items: list[Item]) -> list[Item]:
    """What the model said, for the next turn."""
    told: Item = {"role": "assistant", "content": ""}
    for item in items:
        if item["type"] == "message":
            told["content"] += item["content"][0]["text"]
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            told.setdefault("tool_calls", []).append(call)
    return [told]
