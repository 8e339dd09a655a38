"""What an answer with function calls must follow."""

from __future__ import annotations

import json
from typing import Any

from cluster.gateway.context import Gateway
from cluster.gateway.schemas.fields import JsonObject
from cluster.gateway.structured import ANY_OBJECT, compiled
from cluster.gateway.tools import Toolbox, format_of
from cluster.router import grammar


async def required_calls(gateway: Gateway, tools: Toolbox) -> str:
    """The grammar where a call is required: the arguments of the named function, or a list of calls; else ""."""
    if tools.named is not None:
        function = next(function for function in tools.functions if function.name == tools.named)
        return await compiled(gateway, "tools", function.parameters or ANY_OBJECT, grammar.from_json_schema)
    if tools.choice != "required":
        return ""
    return await compiled(gateway, "tools", _listed(tools, "parameters"), grammar.from_json_schema)


async def answer_or_calls(gateway: Gateway, tools: Toolbox, answer: str) -> str:
    """The grammar of an answer that follows the grammar `answer`, or is calls instead where there is something to
    call."""
    if (form := format_of(gateway, tools)) is None:
        return answer
    special = gateway.tokenizer.special_id(form.opening)
    opening = f"<[{special}]>" if special is not None else form.opening and json.dumps(form.opening)
    rule = form.rule(opening, one_call=tools.one_call)
    schema = _listed(tools, form.arguments) if form.in_list else _one(tools, form.arguments)

    def joined(schema: JsonObject) -> str:
        return grammar.from_lark_with(
            f"start: @answer | {rule}", {"answer": answer, "call": grammar.from_json_schema(schema)}
        )

    return await compiled(gateway, "tools", schema, joined)


def _one(tools: Toolbox, arguments: str) -> JsonObject:
    """The schema of one call, whose arguments stand under the key `arguments`."""
    schemas = {function.name: function.parameters or ANY_OBJECT for function in tools.functions}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, arguments: schema},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    # The definitions that a function's schema refers to are looked for at the root.
    shared: dict[str, Any] = {}
    for schema in schemas.values():
        for key in ("$defs", "definitions"):
            shared.setdefault(key, {}).update(schema.get(key, {}))
    return {"anyOf": calls} | {key: value for key, value in shared.items() if value}


def _listed(tools: Toolbox, arguments: str) -> JsonObject:
    """The schema of a list of calls."""
    one = _one(tools, arguments)
    listed: JsonObject = {"type": "array", "minItems": 1, "items": {"anyOf": one.pop("anyOf")}} | one
    return listed | {"maxItems": 1} if tools.one_call else listed
