"""The body of a chat request."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.gateway.schemas.fields import MAX_TOOLS, JsonObject, MaxTokens, NTop, Small, TemplateText
from cluster.gateway.schemas.messages import Function, Messages, NamedFunction, NamedTool, Tool
from cluster.gateway.schemas.sampling import SamplingFields


class ChatRequest(SamplingFields):
    messages: Messages
    max_tokens: Annotated[
        MaxTokens | None, Field(description="Default: the checkpoint's, else what the context has room for")
    ] = None
    max_completion_tokens: Annotated[MaxTokens | None, Field(description="The newer name of max_tokens")] = None
    logprobs: bool | None = None
    top_logprobs: NTop | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), Small] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: one call at most")] = None
    functions: Annotated[list[Function], Field(fail_fast=True, max_length=MAX_TOOLS), Small] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    add_generation_prompt: Annotated[bool | None, Field(description="Begin the assistant's turn; default true")] = None
    continue_final_message: Annotated[bool | None, Field(description="Go on with the last message's text")] = None
    add_special_tokens: bool | None = None
    echo: Annotated[bool | None, Field(description="Put the last message before the answer")] = None
    chat_template: Annotated[
        TemplateText | None,
        Field(description="The name of one of the model's; with --trust-request-chat-template also a template"),
    ] = None
    chat_template_kwargs: Annotated[JsonObject | None, Field(description="More names for the chat template")] = None
    documents: Annotated[
        Annotated[list[JsonObject], Field(max_length=1024, fail_fast=True), Small] | None,
        Field(description="For templates that know documents"),
    ] = None
    include_reasoning: Annotated[bool | None, Field(description="false: reasoning is not part of the answer")] = None
    service_tier: str | None = None
    store: Annotated[bool | None, Field(description="Accepted; chats are not stored")] = None
    prediction: Annotated[JsonObject | None, Field(description="Accepted; it changes no answer")] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
