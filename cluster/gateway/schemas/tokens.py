"""Bodies of requests about tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.gateway.schemas.fields import MAX_TOOLS, Body, JsonObject, Small, TemplateText, Text, TokenIds
from cluster.gateway.schemas.messages import Messages, Tool


class TokenizeRequest(Body):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool | None, Field(description="Default: true for a prompt, false for messages")] = (
        None
    )
    add_generation_prompt: Annotated[bool | None, Field(description="Of messages, as the next five; default true")] = (
        None
    )
    continue_final_message: bool | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), Small] | None = None
    documents: Annotated[list[JsonObject], Field(max_length=1024, fail_fast=True), Small] | None = None
    chat_template: TemplateText | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds
