"""Messages of a conversation, and the functions that a model may call in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cluster.gateway.schemas.fields import MAX_TOOLS, Body, FunctionName, JsonObject, Text, conversation, of_text


class TextPart(Body):
    """Text, or what another server's assistant thought, which is not said again."""

    type: Literal["text", "input_text", "output_text", "refusal", "thinking", "reasoning", "reasoning_text"]
    text: Text = ""
    refusal: Text = ""
    thinking: Text = ""

    @property
    def said(self) -> str:
        return self.text or self.refusal if self.type not in ("thinking", "reasoning", "reasoning_text") else ""


Part = Annotated[TextPart, BeforeValidator(of_text)]


class FunctionCall(Body):
    name: Text
    arguments: Annotated[Text | JsonObject | None, Field(description="A JSON object, usually as text")] = None


class ToolCall(Body):
    id: Text | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(Body):
    role: Annotated[
        str,
        Field(
            pattern="^[a-z][a-z0-9_-]{0,31}$",
            description="system, user, assistant, tool, or another that the chat template knows; `developer` is the "
            "same as `system`, `function` the older name of `tool`",
        ),
    ]
    content: Annotated[
        Text | Annotated[list[Part], Field(fail_fast=True)] | None,
        Field(description="null: an assistant that only calls"),
    ] = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: Text | None = None
    reasoning: Annotated[Text | None, Field(description="Another name of reasoning_content")] = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    audio: None = None


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(conversation)]


class Function(Body):
    name: FunctionName
    description: Text | None = None
    parameters: Annotated[JsonObject | None, Field(description="A JSON schema of an object; default: any")] = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


def function_tool(name: str, description: str | None, parameters: JsonObject | None) -> JsonObject:
    """A tool as chat requests have it, for what came through another endpoint."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def named_tool(name: str | None) -> JsonObject:
    """The choice of one tool, as chat requests have it."""
    return {"type": "function", "function": {"name": name}}
