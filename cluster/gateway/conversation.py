"""A chat request, whichever endpoint it came through, to the sequences that answer it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.errors import RequestError
from cluster.gateway import sampling
from cluster.gateway.call_grammar import answer_or_calls, required_calls
from cluster.gateway.context import Gateway
from cluster.gateway.generation import Choice
from cluster.gateway.offload import aside, give_way
from cluster.gateway.prompts import check_length, encode
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.schemas.messages import FunctionCall, Message
from cluster.gateway.structured import check_alone, grammar_of
from cluster.gateway.tools import Toolbox, format_of, marks, parser, taught, toolbox

_MESSAGE_SIZE = 40  # characters that take as long to encode as a message, or a call in it, to render
_TOOL_SIZE = 400  # the same of a tool's description
_OURS = frozenset({"messages", "tools", "template", "self"})  # names that a template gets from other fields


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is needed to answer: one choice for each of `n`."""

    choices: list[Choice]
    tools: Toolbox


def plain_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as templates know them: text parts joined by line ends, `system` and `tool` for their other names, the
    arguments of a call as an object.

    Raises RequestError for a message without content that is no assistant's call.
    """
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            content = "\n".join(part.said for part in content if part.said)
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        told: dict[str, Any] = {"role": role, "content": content}
        calls = [call.function for call in message.tool_calls or ()]
        if message.function_call is not None:
            calls.append(message.function_call)
        if calls:
            ids = [call.id for call in message.tool_calls or ()] or [None] * len(calls)
            told["tool_calls"] = [_call(call, id_) for call, id_ in zip(calls, ids, strict=False)]
            told["content"] = content or ""
        elif content is None:
            if role != "assistant":
                where = f"messages[{i}].content"
                raise RequestError(f"'{where}' is required", code="missing_required_parameter", param=where)
            told["content"] = message.refusal or ""
        more = {
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content or message.reasoning,
        }
        told |= {name: value for name, value in more.items() if value is not None}
        plain.append(told)
    return plain


def _call(call: FunctionCall, id_: str | None) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not isinstance(arguments, dict):
        with suppress(ValueError):  # else as it was written: the model said so once
            arguments = json.loads(arguments or "{}")
    told = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return told if id_ is None else {"id": id_, **told}


async def render(gateway: Gateway, request: ChatRequest, tools: Toolbox) -> str:
    """The prompt of a conversation. Raises RequestError where the template refuses it."""
    size = _MESSAGE_SIZE * sum(1 + len(message.tool_calls or ()) for message in request.messages)
    messages = await aside(plain_messages, request.messages, size)
    await give_way()
    described = await aside(Toolbox.described, tools, _TOOL_SIZE * len(tools.functions))
    more = dict(request.chat_template_kwargs or {})
    if taken := more.keys() & _OURS:
        param = f"chat_template_kwargs.{min(taken)}"
        raise RequestError(f"'{param}' is a field of the request itself", code="invalid_value", param=param)
    if request.documents is not None:
        more["documents"] = request.documents
    generate = bool(more.pop("add_generation_prompt", request.add_generation_prompt is not False))
    template = request.chat_template
    is_foreign = template is not None and template not in gateway.tokenizer.chat_templates
    if is_foreign and not gateway.config.trust_request_chat_template:
        names = ", ".join(gateway.tokenizer.chat_templates) or "none"
        message = f"'chat_template' may name a template of this model ({names}); this server takes none from requests"
        raise RequestError(message, code="unsupported_parameter", param="chat_template")

    async def rendered(*, add_generation_prompt: bool) -> str:
        extra = {"add_generation_prompt": add_generation_prompt, "tools": described, **more}
        if is_foreign:
            return await gateway.templates.render(template or "", messages, **extra)
        apply = partial(gateway.tokenizer.apply_chat_template, template=template, **extra)
        return await aside(apply, messages, size)

    knows_tools = gateway.tokenizer.tool_format if not is_foreign else "tools" in (template or "")
    if described is not None and not knows_tools:
        form = format_of(gateway, tools)
        assert form is not None
        messages = await aside(partial(taught, tools=described, form=form), messages, size)
        described = None
    if not request.continue_final_message:
        return await rendered(add_generation_prompt=generate)
    last = messages[-1]["content"].strip()
    if request.add_generation_prompt or messages[-1]["role"] != "assistant" or not last:
        message = "'continue_final_message' needs an assistant's text last, and no 'add_generation_prompt'"
        raise RequestError(message, code="invalid_value", param="continue_final_message")
    prompt = await rendered(add_generation_prompt=False)
    return prompt[: prompt.rindex(last) + len(last)] if last in prompt else prompt


async def converse(gateway: Gateway, request: ChatRequest, *, logprobs: int | None = None) -> Conversation:
    """Check, render, tokenise. Raises RequestError naming the field at fault."""
    gateway.check_model(request.model)
    gateway.check_unknown(request)
    await give_way()
    tools = toolbox(request)
    if grammar := await required_calls(gateway, tools):
        check_alone(request)
    elif asked := await grammar_of(gateway, request):
        grammar = await answer_or_calls(gateway, tools, asked)
    prompt = await render(gateway, request, tools)
    await give_way()
    check_length(gateway, prompt, "messages")
    prompt_ids = await encode(gateway, prompt, add_special_tokens=bool(request.add_special_tokens))
    prompt_ids = sampling.truncated(prompt_ids, request)
    limit = request.max_completion_tokens
    name = "max_tokens" if limit is None else "max_completion_tokens"
    limit = request.max_tokens if limit is None else limit
    if limit is None:  # as long as it likes, or as the checkpoint says
        room = max(gateway.model.max_context - len(prompt_ids), 1)
        limit = min(gateway.model.defaults.max_new_tokens or room, room)
    bad_words = await sampling.bad_words(gateway, request)
    params = sampling.sampling_params(gateway, request, max_tokens=limit, bad_words=bad_words, logprobs=logprobs)
    params = replace(params, grammar=grammar)
    sampling.check(gateway, prompt_ids, params, prompt="messages", max_tokens=name)
    text = sampling.sequence_texts(gateway, request, special=_shows_special(gateway, request, tools))
    choices = [
        Choice(
            i,
            prompt_ids,
            sampling.nth(params, i),
            text(),
            parser=parser(gateway, tools, prompt, follows_grammar=bool(grammar)),
        )
        for i in range(request.n or 1)
    ]
    return Conversation(choices, tools)


def echoed(request: ChatRequest) -> str:
    """What goes before the answer: the last message's text, if that is wanted."""
    if not request.echo:
        return ""
    content = plain_messages(request.messages[-1:])[0]["content"]
    return str(content)


def _shows_special(gateway: Gateway, request: ChatRequest, tools: Toolbox) -> bool:
    """Whether special tokens are part of the text: asked for, or what it is taken apart by."""
    return request.skip_special_tokens is False or any(
        gateway.tokenizer.special_id(mark) is not None for mark in marks(gateway, tools)
    )
