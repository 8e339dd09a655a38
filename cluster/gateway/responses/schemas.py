"""Request bodies of OpenAI's Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from cluster.gateway.schemas.fields import (
    MAX_TOOLS,
    Absent,
    Body,
    FunctionName,
    JsonObject,
    MaxTokens,
    No,
    NTop,
    Small,
    Text,
    at_most,
    conversation,
)
from cluster.gateway.schemas.messages import Part
from cluster.router import limits


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]


class InputCall(Body):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Annotated[list[Part], Field(fail_fast=True)]


class InputReasoning(Body):
    type: Literal["reasoning"]
    content: list[JsonObject] | None = None


def _kind(item: Any) -> Any:
    return (item.get("type") or "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")]
    | Annotated[InputMessage, Tag("message")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="'type' must be 'message', 'function_call', 'function_call_output' or 'reasoning'",
    ),
]


class FunctionTool(Body):
    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: FunctionName


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


def _input(value: Any) -> Any:
    if value in (None, []) or not isinstance(value, str | list):
        raise ValueError("must be a text, or a list of at least one item")
    return value


_Items = BeforeValidator(conversation)  # in the class the name is a field's


class ResponsesRequest(Body):
    model: Annotated[str, Field(description="The id that /v1/models shows")]
    input: Annotated[
        Text | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), _Items],
        BeforeValidator(_input),
    ]
    instructions: Text | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True), Small] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=limits.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: NTop | None = None
    stream: bool | None = None
    stream_options: JsonObject | None = None
    store: Annotated[bool | None, Field(description="false: cannot be gone on with; default true")] = None
    previous_response_id: Text | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(at_most(64, "entries"))] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: JsonObject | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    user: str | None = None
    service_tier: Any = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    background: No | None = None
    conversation: Absent = None
    prompt: Absent = None

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens are asked for; None: no log-probabilities at all."""
        if self.top_logprobs or "message.output_text.logprobs" in (self.include or ()):
            return self.top_logprobs or 0
        return None
