"""A whole answer, from its parts."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.gateway.parsers.parts import CallStart, Content, Part, Reasoning


@dataclass(slots=True)
class Call:
    """One function call; `arguments` is JSON text."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Written:
    """What an answer says, what the model thought before, and the functions it calls."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Written:
        written = cls()
        for part in parts:
            if isinstance(part, Content):
                written.content += part.text
            elif isinstance(part, Reasoning):
                written.reasoning += part.text
            elif isinstance(part, CallStart):
                written.calls.append(Call(part.name))
            else:
                written.calls[part.index].arguments += part.text
        return written


def call_id() -> str:
    """Nine letters and digits, which every template takes (Mistral's refuses others)."""
    return secrets.token_hex(5)[:9]
