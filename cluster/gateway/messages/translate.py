"""Anthropic's request bodies as chat requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.gateway.messages.schemas import (
    CountRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.schemas.messages import function_tool, named_tool

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_SAME = ("temperature", "top_p", "top_k", "stream", "max_tokens")


def chat_request(body: CountRequest) -> ChatRequest:
    """The same as a chat request. Raises pydantic.ValidationError where chat would not take it."""
    asked: dict[str, Any] = {"model": body.model, "messages": list(_messages(body))}
    if body.tools is not None:
        asked["tools"] = [function_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools]
    if (choice := body.tool_choice) is not None:
        asked["tool_choice"] = named_tool(choice.name) if choice.type == "tool" else _CHOICES[choice.type]
        asked["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(body, MessagesRequest):
        asked |= {name: getattr(body, name) for name in _SAME} | {"stop": body.stop_sequences}
        if body.output_config is not None and body.output_config.format is not None:
            schema = {"schema": body.output_config.format.schema_}
            asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    return ChatRequest.model_validate(asked)


def _messages(body: CountRequest) -> Iterator[dict[str, Any]]:
    if body.system is not None:
        yield {"role": "system", "content": _text(body.system)}
    for message in body.messages:
        yield from _message(message)


def _message(message: InputMessage) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own, before what the user says with them."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")}
    if texts or calls or message.role == "assistant" or not message.content:
        told: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
        if thoughts:
            told["reasoning_content"] = "\n".join(thoughts)
        if calls:
            told["tool_calls"] = calls
        yield told


def _text(content: str | Iterable[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
