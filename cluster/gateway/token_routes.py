"""The model's tokenizer, under the paths and names that vLLM gives it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway import response_bodies
from cluster.gateway.context import Gateway
from cluster.gateway.conversation import render
from cluster.gateway.json_bodies import JsonRoute
from cluster.gateway.offload import aside
from cluster.gateway.prompts import decode, encode
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.schemas.tokens import DetokenizeRequest, TokenizeRequest
from cluster.gateway.sse import dump_large
from cluster.gateway.tools import toolbox

_OF_CHATS = (
    "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template", "chat_template_kwargs",
)  # fmt: skip


def token_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["tokens"], route_class=JsonRoute)

    @router.post("/tokenize", response_model=response_bodies.Tokenized)
    async def tokenize(request: TokenizeRequest) -> Response:
        """The token ids of a text, or of the prompt that messages make."""
        gateway.check_model(request.model)
        text, special = await _text(gateway, request)
        tokens = await encode(gateway, text, add_special_tokens=special)

        def answer(tokens: list[int]) -> str:
            names = [gateway.tokenizer.token(token_id) for token_id in tokens] if request.return_token_strs else None
            counts = {"count": len(tokens), "max_model_len": gateway.model.max_context}
            return dump_large(counts | {"tokens": tokens, "token_strs": names})

        return Response(await aside(answer, tokens, len(tokens)), media_type="application/json")

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> response_bodies.Detokenized:
        """The text of token ids, special tokens by their names."""
        gateway.check_model(request.model)
        if max(request.tokens, default=0) >= gateway.model.vocab_size:
            message = f"'tokens' has an id out of vocabulary (0..{gateway.model.vocab_size - 1})"
            raise RequestError(message, code="invalid_value", param="tokens")
        return response_bodies.Detokenized(prompt=await decode(gateway, request.tokens))

    return router


async def _text(gateway: Gateway, request: TokenizeRequest) -> tuple[str, bool]:
    """What to tokenize, and whether to put the tokenizer's special tokens around it."""
    asked = request.add_special_tokens
    if request.messages is not None and request.prompt is None:
        same = {name: getattr(request, name) for name in _OF_CHATS}
        chat = ChatRequest(model=gateway.model.id, messages=request.messages, **same)
        return await render(gateway, chat, toolbox(chat)), bool(asked)
    if request.messages is not None:
        raise RequestError("Give 'prompt' or 'messages', not both", code="invalid_value", param="prompt")
    if request.prompt is None:
        raise RequestError("'prompt' or 'messages' is required", code="missing_required_parameter", param="prompt")
    return request.prompt, asked is not False
