"""Fields that say what an answer must follow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.gateway.schemas.fields import MAX_TOOLS, Body, JsonObject, Small, Stop, Text


class JsonSchema(Body):
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TagStructure(Body):
    begin: Annotated[Stop, Field(description="Begins with a trigger")]
    schema_: Annotated[JsonObject, Field(alias="schema")]
    end: Text


class StructuralTag(Body):
    """Free text; from a trigger on it is one of the structures: its beginning, JSON of its schema, its end."""

    structures: Annotated[list[TagStructure], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True), Small]
    triggers: Annotated[list[Stop], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Annotated[
        Annotated[list[TagStructure], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True), Small] | None,
        Field(description="Of a structural_tag"),
    ] = None
    triggers: Annotated[list[Stop], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None = None


class StructuredOutputs(Body):
    """What an answer must follow; exactly one."""

    json_: Annotated[JsonObject | str | None, Field(alias="json", description="A JSON schema")] = None
    regex: Text | None = None
    choice: Annotated[list[Stop], Field(fail_fast=True, min_length=1, max_length=1000)] | None = None
    grammar: Annotated[Text | None, Field(description="A context-free grammar in Lark's or GBNF's syntax")] = None
    json_object: bool | None = None
    structural_tag: Annotated[StructuralTag | Text | None, Field(description="As an object or as its JSON")] = None
