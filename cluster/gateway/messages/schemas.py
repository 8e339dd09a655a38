"""Request bodies of Anthropic's Messages API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cluster.gateway.schemas.fields import (
    MAX_TOOLS,
    Body,
    FunctionName,
    Integer,
    JsonObject,
    MaxTokens,
    Small,
    Stop,
    Text,
    conversation,
    of_text,
)
from cluster.router import limits


class TextBlock(Body):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: Text


class RedactedBlock(Body):
    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: JsonObject


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | Annotated[list[Annotated[TextBlock, BeforeValidator(of_text)]], Field(fail_fast=True)] | None = None
    is_error: bool | None = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
    BeforeValidator(of_text),
]


class InputMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Field(fail_fast=True)]


class ToolDefinition(Body):
    name: FunctionName
    description: Text | None = None
    input_schema: JsonObject
    type: Literal["custom"] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Body):
    format: OutputFormat | None = None


class CountRequest(Body):
    model: Annotated[str, Field(description="The id that /v1/models shows")]
    messages: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True), BeforeValidator(conversation)]
    system: Text | Annotated[list[Annotated[TextBlock, BeforeValidator(of_text)]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True), Small] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Annotated[JsonObject | None, Field(description="Accepted; a model thinks as its template says")] = None


class MessagesRequest(CountRequest):
    max_tokens: MaxTokens
    temperature: Annotated[float, Field(ge=0, le=limits.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=limits.MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: JsonObject | None = None
    service_tier: Any = None
    output_config: OutputConfig | None = None
