"""What an answer must follow, from a request's fields to a grammar."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import llguidance
from pydantic import ValidationError

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.schemas.fields import JsonObject
from cluster.gateway.schemas.outputs import StructuralTag
from cluster.gateway.schemas.sampling import SamplingFields
from cluster.router import grammar, limits
from cluster.router.grammar import GrammarCompiler

ANY_OBJECT: JsonObject = {"type": "object"}
_COMPILE_TIMEOUT_S = 10.0
_MAX_BLAMED = 200  # sub-schemas that are tried alone to find the one at fault


async def grammar_of(gateway: Gateway, request: SamplingFields) -> str:
    """The grammar that `request` asks for, compiled once to know that it can be; "" where it asks for none.

    Raises RequestError naming the field, and the place in a JSON schema, that is at fault.
    """
    asked = [(param, value, make) for param, value, make in _asked(request) if value is not None and value is not False]
    if len(asked) > 1:
        names = " and ".join(f"'{param}'" for param, _, _ in asked)
        raise RequestError(f"{names} exclude each other", code="invalid_value", param=asked[1][0])
    if not asked:
        return ""
    param, value, make = asked[0]
    return await compiled(gateway, param, value, make)


def check_alone(request: SamplingFields) -> None:
    """Raise RequestError for a grammar beside a call that is required. A `response_format` is of answers only, and may
    stand there."""
    for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if getattr(request, name) is not None:
            raise RequestError(
                f"'{name}' and a required tool call exclude each other", code="invalid_value", param=name
            )


async def compiled(gateway: Gateway, param: str, value: Any, make: Callable[[Any], str]) -> str:
    """The grammar that `make` makes of the field `param`. Raises RequestError where it cannot be compiled."""
    try:
        source = await asyncio.to_thread(make, value)
    except (ValueError, TypeError) as error:
        raise _invalid(param, str(error)) from error
    if len(source) > limits.MAX_GRAMMAR_CHARACTERS:
        raise _invalid(param, f"has {len(source)} characters; at most {limits.MAX_GRAMMAR_CHARACTERS} are allowed")
    try:
        await _compile(gateway.grammars, source)
    except RequestError as error:
        path = await _path_at_fault(gateway.grammars, value) if isinstance(value, dict) else ""
        raise _invalid(f"{param}{path}", str(error)) from error
    return source


def _asked(request: SamplingFields) -> Iterator[tuple[str, Any, Callable[[Any], str]]]:
    form = request.response_format
    if form is not None and form.type == "json_object":
        yield "response_format", ANY_OBJECT, grammar.from_json_schema
    elif form is not None and form.type == "json_schema":
        schema = None if form.json_schema is None else form.json_schema.schema_
        if schema is None:
            raise RequestError("'response_format.json_schema.schema' is required", code="missing_required_parameter",
                               param="response_format.json_schema.schema")  # fmt: skip
        yield "response_format.json_schema.schema", schema, grammar.from_json_schema
    elif form is not None and form.type == "structural_tag":
        if form.structures is None or form.triggers is None:
            raise RequestError("'response_format' needs 'structures' and 'triggers'", code="missing_required_parameter",
                               param="response_format.structures")  # fmt: skip
        tag = StructuralTag(structures=form.structures, triggers=form.triggers)
        yield "response_format.structures", tag, _from_structural_tag
    wanted = request.structured_outputs
    if wanted is not None:
        yield "structured_outputs.json", _schema(wanted.json_, "structured_outputs.json"), grammar.from_json_schema
        yield "structured_outputs.json_object", wanted.json_object and ANY_OBJECT, grammar.from_json_schema
        yield "structured_outputs.regex", wanted.regex, grammar.from_regex
        yield "structured_outputs.choice", wanted.choice, grammar.from_choice
        yield "structured_outputs.grammar", wanted.grammar, _from_grammar
        yield "structured_outputs.structural_tag", wanted.structural_tag, _from_structural_tag
    yield "guided_json", _schema(request.guided_json, "guided_json"), grammar.from_json_schema
    yield "guided_regex", request.guided_regex, grammar.from_regex
    yield "guided_choice", request.guided_choice, grammar.from_choice
    yield "guided_grammar", request.guided_grammar, _from_grammar


def _schema(value: JsonObject | str | None, param: str) -> JsonObject | None:
    """A schema may come as text."""
    if not isinstance(value, str):
        return value
    try:
        schema = json.loads(value)
    except ValueError as error:
        raise _invalid(param, f"is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise _invalid(param, "must be an object")
    return schema


def _from_grammar(source: str) -> str:
    """Lark's syntax as it is, GBNF turned into it."""
    return str(llguidance.grammar_from("grammar", source))


def _from_structural_tag(tag: StructuralTag | str) -> str:
    """Free text with structures in it. Raises ValueError where one begins with no trigger, or the text is no tag."""
    if isinstance(tag, str):
        try:
            tag = StructuralTag.model_validate_json(tag)
        except ValidationError as error:
            raise ValueError("must be JSON of an object with 'structures' and 'triggers'") from error
    parts: list[llguidance.StructTag] = []
    for each in tag.structures:
        trigger = next((trigger for trigger in tag.triggers if each.begin.startswith(trigger)), None)
        if trigger is None:
            raise ValueError(f"{each.begin[:100]!r} begins with none of the triggers")
        parts.append(llguidance.StructTag(trigger=trigger, begin=each.begin, grammar=each.schema_, end=each.end))
    return llguidance.StructTag.to_grammar(parts, assume_special=False)


async def _compile(grammars: GrammarCompiler, source: str) -> None:
    try:
        compiled = asyncio.wrap_future(grammars.compile(source))
        await asyncio.wait_for(asyncio.shield(compiled), _COMPILE_TIMEOUT_S)  # others may wait for it too
    except TimeoutError as error:
        raise RequestError("takes too long to compile", code="invalid_grammar") from error


async def _path_at_fault(grammars: GrammarCompiler, schema: Mapping[str, Any]) -> str:
    """Where in `schema` the deepest part stands that cannot be compiled on its own, as `.properties.x`."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    path, part, tried = "", schema, 0
    while True:
        for step, inner in _inner(part):
            tried += 1
            try:
                source = await asyncio.to_thread(grammar.from_json_schema, shared | dict(inner))
                await _compile(grammars, source)
            except (RequestError, ValueError):
                path, part = path + step, inner
                break
            if tried > _MAX_BLAMED:
                return path
        else:
            return path


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas directly inside one, with the way to each."""
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            yield from ((f".{key}.{name}", inner) for name, inner in value.items() if isinstance(inner, dict))
        elif key in ("items", "additionalProperties", "not", "contains") and isinstance(value, dict):
            yield f".{key}", value
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            yield from ((f".{key}[{i}]", inner) for i, inner in enumerate(value) if isinstance(inner, dict))


def _invalid(param: str, what: str) -> RequestError:
    return RequestError(f"'{param}': {what}", code="invalid_value", param=param)
