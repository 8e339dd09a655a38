"""The tools of a chat request: what the template is told of them, and how calls are found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.parsers.formats import DEFAULT_FORMAT, END_THINK, THINK, TOOL_FORMATS, ToolFormat
from cluster.gateway.parsers.message_parser import MessageParser
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.schemas.fields import JsonObject
from cluster.gateway.schemas.messages import Function, NamedFunction, NamedTool

_TAUGHT = (
    "You can call functions to help the user. They are described here, as JSON:\n{tools}\n"
    "To call one, answer with {example}, where ARGUMENTS is a JSON object that its parameters describe."
)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """`choice`: "none", "auto", "required", or the name of the function to call."""

    functions: tuple[Function, ...]
    choice: str
    one_call: bool
    legacy: bool  # asked for as `functions`, to be answered as `function_call`

    @property
    def is_offered(self) -> bool:
        """Whether there is a function that the model may call."""
        return self.choice != "none" and bool(self.functions)

    def described(self) -> list[JsonObject] | None:
        """For a chat template; None without any that the model may call."""
        if not self.is_offered:
            return None
        functions = [
            function.model_dump(exclude_none=True, exclude=set(function.unknown())) for function in self.functions
        ]
        return [{"type": "function", "function": function} for function in functions]

    @property
    def named(self) -> str | None:
        return None if self.choice in ("none", "auto", "required") else self.choice


def toolbox(request: ChatRequest) -> Toolbox:
    """Raises RequestError where a choice names no tool, or there is none to choose from."""
    legacy = request.functions is not None and request.tools is None
    functions = tuple(request.functions or ()) if legacy else tuple(tool.function for tool in request.tools or ())
    param = "function_call" if legacy else "tool_choice"
    asked: str | NamedTool | NamedFunction | None = request.function_call if legacy else request.tool_choice
    if isinstance(asked, NamedTool):
        asked = asked.function
    choice = asked.name if isinstance(asked, NamedFunction) else asked
    if choice is None:
        choice = "auto" if functions else "none"
    known = {function.name for function in functions}
    if len(known) < len(functions):
        raise RequestError("Two tools have the same name", code="invalid_value", param="tools")
    if choice not in ("none", "auto", *known) and not (choice == "required" and known):
        what = "needs 'tools'" if not known else f"names `{choice[:64]}`, which is none of the tools"
        raise RequestError(f"'{param}' {what}", code="invalid_value", param=param)
    return Toolbox(functions, choice, legacy or request.parallel_tool_calls is False, legacy)


def format_of(gateway: Gateway, tools: Toolbox) -> ToolFormat | None:
    """How the model writes calls; None where it has nothing to call."""
    if not tools.is_offered:
        return None
    return TOOL_FORMATS[gateway.config.tool_call_parser or gateway.tokenizer.tool_format or DEFAULT_FORMAT]


def marks(gateway: Gateway, tools: Toolbox) -> set[str]:
    """What the answer is taken apart by."""
    found = set() if (form := format_of(gateway, tools)) is None else {form.opening, form.closing}
    if gateway.tokenizer.teaches(THINK):
        found |= {THINK, END_THINK}
    return found - {""}


def parser(gateway: Gateway, tools: Toolbox, prompt: str, *, follows_grammar: bool) -> MessageParser | None:
    """For one answer to `prompt`; None where there is nothing to find in it."""
    thinks = gateway.tokenizer.teaches(THINK) and not follows_grammar
    if not tools.is_offered and not thinks:
        return None
    return MessageParser(
        format_of(gateway, tools),
        names=frozenset(function.name for function in tools.functions),
        only_calls=tools.choice == "required",
        named=tools.named,
        one_call=tools.one_call,
        thinks=thinks,
        is_thinking=thinks and prompt.rstrip().endswith(THINK) and END_THINK not in prompt[prompt.rfind(THINK) :],
    )


def taught(messages: Sequence[dict[str, Any]], tools: Sequence[JsonObject], form: ToolFormat) -> list[dict[str, Any]]:
    """`messages` for a template that knows nothing of tools: they are described in the system message, and calls and
    results written as text."""
    example = form.written([f'{{"name": NAME, "{form.arguments}": ARGUMENTS}}'])
    text = _TAUGHT.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools), example=example)
    told: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "tool":
            told.append({"role": "user", "content": f"<tool_response>{content}</tool_response>"})
        elif message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            texts = [json.dumps({"name": call["name"], form.arguments: call["arguments"]}) for call in calls]
            told.append({"role": "assistant", "content": content + form.written(texts)})
        else:
            told.append(message)
    if told and told[0]["role"] == "system":
        return [{"role": "system", "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]
