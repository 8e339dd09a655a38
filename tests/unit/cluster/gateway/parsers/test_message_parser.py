"""Answers as models write them, cut into pieces anywhere.

Catches: a result that depends on the cut, a marker or a bracket that leaks into the text, a call that is lost, text
that only looked like a call and is not shown.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from cluster.gateway.parsers.formats import TOOL_FORMATS, tool_format_of
from cluster.gateway.parsers.message_parser import MessageParser
from cluster.gateway.parsers.parts import Part
from cluster.gateway.parsers.written import Written

HERMES, MISTRAL, LLAMA = (TOOL_FORMATS[name] for name in ("hermes", "mistral", "llama3_json"))
NESTED = '{"a": "x}\\"y</tool_call>", "b": [1, {"c": 2}]}'
CASES: list[tuple[dict[str, Any], str, str, str, list[tuple[str, str]]]] = [
    (
        {"tools": HERMES},
        f'Sure. <tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"q":1}, "name": "g"}\n</tool_call>',
        "Sure. ", "", [("f", NESTED), ("g", '{"q":1}')],
    ),
    ({"tools": HERMES}, '<tool_call>[{"name": "f", "arguments": {}}, {"name":"g"}]</tool_call>',
     "", "", [("f", "{}"), ("g", "{}")]),
    ({"tools": HERMES}, "a < b <tool broken <tool_call> no", "a < b <tool broken <tool_call> no", "", []),
    ({"tools": HERMES}, '<tool_call>{"name": "f", "arguments": {}}</tool_call> done', "done", "", [("f", "{}")]),
    ({"tools": HERMES, "one_call": True},
     '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>', "", "", [("f", "{}")]),
    ({"tools": MISTRAL}, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"é": []}}]',
     "", "", [("f", '{"a": 1}'), ("g", '{"é": []}')]),
    ({"tools": MISTRAL}, '[TOOL_CALLS]f{"a": {"z": 1}}[TOOL_CALLS]g[ARGS]{"b": 2}',
     "", "", [("f", '{"a": {"z": 1}}'), ("g", '{"b": 2}')]),
    ({"tools": LLAMA}, '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
     "", "", [("f", '{"a": 1}'), ("g", "{}")]),
    ({"tools": LLAMA}, 'hello {"name": 1}', 'hello {"name": 1}', "", []),
    ({"tools": LLAMA}, '{"answer": 1}', '{"answer": 1}', "", []),
    ({"tools": HERMES, "thinks": True},
     '<think>\nhm <tool_call> no\n</think>\n\nOK <tool_call>{"name":"f","arguments":{}}</tool_call>',
     "OK ", "hm <tool_call> no\n", [("f", "{}")]),
    ({"thinks": True}, "no thought", "no thought", "", []),
    ({"thinks": True, "is_thinking": True}, "because\n</think>\n\nyes", "yes", "because\n", []),
    ({"thinks": True, "is_thinking": True}, "cut off </th", "", "cut off </th", []),
    ({"only_calls": True}, '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]',
     "", "", [("f", '{"a": 1}'), ("g", "{}")]),
    ({"named": "h"}, '{"a": 1}', "", "", [("h", '{"a": 1}')]),
]  # fmt: skip


def parsed(make: Callable[[], MessageParser], text: str, chance: random.Random | None) -> Written:
    parser, parts, i = make(), list[Part](), 0
    while i < len(text):
        n = chance.randint(1, 6) if chance else len(text)
        parts += parser.push(text[i : i + n])
        i += n
    parts += parser.finish()
    written = Written.of(parts)
    assert parser.n_calls == len(written.calls)
    return written


@pytest.mark.parametrize(("options", "text", "content", "reasoning", "calls"), CASES)
def test_an_answer_is_taken_apart_however_it_is_cut(
    options: dict[str, Any], text: str, content: str, reasoning: str, calls: list[tuple[str, str]]
) -> None:
    for seed in [None, *range(200)]:
        chance = None if seed is None else random.Random(seed)
        written = parsed(lambda: MessageParser(**options), text, chance)
        assert (written.content, written.reasoning) == (content, reasoning), seed
        assert [(call.name, call.arguments) for call in written.calls] == calls, seed
        for call in written.calls:
            json.loads(call.arguments)


def test_the_format_is_the_one_that_the_template_teaches() -> None:
    assert tool_format_of("{{ messages }}") is None
    assert tool_format_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == "mistral"
    assert tool_format_of("{% if tools %}<tool_call>") == "hermes"
    assert tool_format_of('{% if tools %}{"name": function name, "parameters": {}}') == "llama3_json"
