"""Bodies of the Responses API as chat requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.errors import RequestError
from cluster.gateway.responses.schemas import (
    InputCall,
    InputItem,
    InputMessage,
    InputResult,
    NamedFunctionTool,
    ResponsesRequest,
)
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.schemas.messages import TextPart, function_tool, named_tool

Told = dict[str, Any]


def chat_request(body: ResponsesRequest, before: Sequence[Told]) -> tuple[ChatRequest, list[Told]]:
    """The same as a chat request after the messages `before`; and all its messages but the instructions.

    Raises pydantic.ValidationError where chat would not take it, and RequestError where there is nothing to answer.
    """
    told = [*before, *_messages(body.input)]
    if not told:
        raise RequestError("'input' has no message", code="invalid_value", param="input")
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    asked: Told = {"model": body.model, "messages": [*instructions, *told]}
    asked |= {name: getattr(body, name) for name in ("temperature", "top_p", "stream", "parallel_tool_calls")}
    asked["max_completion_tokens"] = body.max_output_tokens
    if body.tools is not None:
        asked["tools"] = [function_tool(tool.name, tool.description, tool.parameters) for tool in body.tools]
    choice = body.tool_choice
    asked["tool_choice"] = named_tool(choice.name) if isinstance(choice, NamedFunctionTool) else choice
    if body.text is not None and (form := body.text.format) is not None:
        asked["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            asked["response_format"]["json_schema"] = {"schema": form.schema_}
    return ChatRequest.model_validate(asked), told


def _messages(given: str | Sequence[InputItem]) -> Iterator[Told]:
    """What the assistant says and the calls that follow it are one turn."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    turn: Told | None = None  # of the assistant, while more may belong to it
    for item in given:
        if isinstance(item, InputCall):
            turn = turn or {"role": "assistant", "content": ""}
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
            continue
        if turn is not None:
            yield turn
            turn = None
        if isinstance(item, InputMessage) and item.role == "assistant":
            turn = {"role": "assistant", "content": _text(item.content)}
        elif isinstance(item, InputMessage):
            yield {"role": item.role, "content": _text(item.content)}
        elif isinstance(item, InputResult):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    if turn is not None:
        yield turn


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.said for part in content if part.said)
