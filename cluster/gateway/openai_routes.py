"""The routes that OpenAI's clients call."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import Discriminator, Tag
from starlette.responses import Response

from cluster.gateway import response_bodies
from cluster.gateway.chat import chat
from cluster.gateway.completions import complete
from cluster.gateway.context import Gateway
from cluster.gateway.json_bodies import JsonRoute
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.schemas.completions import CompletionRequest


def _kind(body: Any) -> str:
    return "chat" if isinstance(body, dict) and "messages" in body else "text"


Invocation = Annotated[
    Annotated[ChatRequest, Tag("chat")] | Annotated[CompletionRequest, Tag("text")], Discriminator(_kind), Body()
]


def openai_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)
    card = response_bodies.ModelObject(
        id=gateway.model.id,
        object="model",
        created=gateway.model.created,
        owned_by="expertmesh",
        root=gateway.model.id,
        max_model_len=gateway.model.max_context,
    )

    @router.post(
        "/v1/chat/completions", response_model=response_bodies.ChatCompletion, responses=response_bodies.STREAM
    )
    async def chat_completions(request: ChatRequest) -> Response:
        """Answer a conversation."""
        return await chat(gateway, request)

    @router.post("/v1/completions", response_model=response_bodies.Completion, responses=response_bodies.STREAM)
    async def completions(request: CompletionRequest) -> Response:
        """Go on with a text."""
        return await complete(gateway, request)

    @router.post("/invocations", response_model=response_bodies.AnyObject, responses=response_bodies.STREAM)
    async def invocations(request: Invocation) -> Response:
        """A chat or a text completion, by whether it has `messages`: the one path that SageMaker calls."""
        if isinstance(request, ChatRequest):
            return await chat(gateway, request)
        return await complete(gateway, request)

    @router.get("/v1/models")
    async def models() -> response_bodies.ModelList:
        """The models served here: one."""
        return response_bodies.ModelList(object="list", data=[card])

    @router.get("/v1/models/{model:path}")
    async def model_card(model: str) -> response_bodies.ModelObject:
        """One model."""
        gateway.check_model(model)
        return card

    return router
