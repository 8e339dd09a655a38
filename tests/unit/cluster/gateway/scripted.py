"""Gateways whose model says a given text."""

from __future__ import annotations

from typing import Any

from tests.unit.cluster.gateway.fake_gateway import Served

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def say(served: Served, text: str) -> None:
    """Answer with `text` and end; forget what was asked before."""
    served.session.reset()
    served.session.say(*served.tokenizer.encode(text, add_special_tokens=False), 2)


def prompt(served: Served) -> str:
    """The last prompt."""
    return served.tokenizer.decode(served.session.asked[-1][0], skip_special_tokens=False)
