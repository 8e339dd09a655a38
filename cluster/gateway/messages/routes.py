"""Anthropic's Messages API."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from cluster.gateway import response_bodies
from cluster.gateway.context import Gateway
from cluster.gateway.conversation import converse, render
from cluster.gateway.generation import respond
from cluster.gateway.http_errors import refusal_of
from cluster.gateway.json_bodies import JsonRoute
from cluster.gateway.messages import errors
from cluster.gateway.messages.form import MessageForm
from cluster.gateway.messages.schemas import CountRequest, MessagesRequest
from cluster.gateway.messages.translate import chat_request
from cluster.gateway.offload import give_way
from cluster.gateway.prompts import encode
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.tools import toolbox


class Counted(BaseModel):
    input_tokens: int


def message_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["Anthropic"], route_class=JsonRoute)

    @router.post(
        "/messages", response_model=response_bodies.AnyObject, responses=errors.RESPONSES | response_bodies.STREAM
    )
    async def messages(body: MessagesRequest) -> Response:
        """Answer a conversation."""
        await give_way()
        gateway.check_unknown(body)
        translated = _translated(body)
        await give_way()
        conversation = await converse(gateway, translated)
        form = MessageForm(gateway, len(conversation.choices[0].prompt_ids))
        return respond(gateway, conversation.choices, 1, form, stream=bool(body.stream), usage=True)

    @router.post("/messages/count_tokens", responses=errors.RESPONSES)
    async def count_tokens(body: CountRequest) -> Counted:
        """The tokens of the prompt that a conversation makes."""
        await give_way()
        request = _translated(body)
        gateway.check_model(request.model)
        prompt = await render(gateway, request, toolbox(request))
        return Counted(input_tokens=len(await encode(gateway, prompt, add_special_tokens=False)))

    return router


def _translated(body: CountRequest) -> ChatRequest:
    try:
        return chat_request(body)
    except ValidationError as error:
        raise refusal_of(error) from error
