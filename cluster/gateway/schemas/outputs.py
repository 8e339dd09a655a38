"""Fields that say what an answer must follow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.gateway.schemas.fields import Body, JsonObject, Stop, Text


class JsonSchema(Body):
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What an answer must follow; exactly one."""

    json_: Annotated[JsonObject | str | None, Field(alias="json", description="A JSON schema")] = None
    regex: Text | None = None
    choice: Annotated[list[Stop], Field(fail_fast=True, min_length=1, max_length=1000)] | None = None
    grammar: Annotated[Text | None, Field(description="A context-free grammar in Lark's or GBNF's syntax")] = None
    json_object: bool | None = None
