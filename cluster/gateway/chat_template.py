"""The chat template of a checkpoint: messages to the text of a prompt.

A template is a program that came with a download, so it runs in jinja2's immutable sandbox: no attribute that begins
with an underscore, no change to what it is given, no range without bounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import CheckpointError, RequestError

Message = Mapping[str, Any]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model was trained to say; to a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template; `special` are the tokens it may name (`bos_token`, `eos_token`, ...).

    Raises CheckpointError where the source is no template.
    """

    def __init__(self, source: str, special: Mapping[str, str], now: Callable[[], datetime] = datetime.now):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"chat template: {error}") from error
        self._special = dict(special)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt of a conversation. Raises RequestError where the template refuses the messages.

        Templates may count on `tools` and `documents`: as with transformers they are None where there are none.
        """
        try:
            return self._template.render(
                self._special | {"tools": None, "documents": None} | extra,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is foreign code: whatever it raises, it did not like the messages
            raise RequestError(f"The model's chat template refuses these messages: {error}",
                               code="invalid_value", param="messages") from error  # fmt: skip
