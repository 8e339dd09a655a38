"""Bodies that clients send, a few of every kind, and ways to spoil them."""

from __future__ import annotations

import json
import random
from typing import Any

_USER: Any = {"role": "user", "content": "Weather in Paris?"}
_PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_FUNCTION: Any = {"name": "weather", "description": "of a city", "parameters": _PARAMETERS}
_TOOL: Any = {"type": "function", "function": _FUNCTION}
_CALL: Any = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
_CALLED: Any = [
    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
    _USER,
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]
_CHAT: Any = {"model": "tiny", "messages": [_USER], "max_tokens": 3}
_TEXT: Any = {"model": "tiny", "prompt": "The capital of", "max_tokens": 3}
_RESPONSE: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 3}
_MESSAGE: Any = {"model": "tiny", "max_tokens": 3, "messages": [_USER]}
CORPUS: list[tuple[str, Any]] = [
    ("/v1/chat/completions", _CHAT | {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x", "yy"]}),
    ("/v1/chat/completions", _CHAT | {"stream": True, "stream_options": {"include_usage": True}, "n": 2}),
    ("/v1/chat/completions", _CHAT | {"messages": _CALLED, "tools": [_TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", _CHAT | {"tools": [_TOOL], "tool_choice": _TOOL | {"function": {"name": "weather"}}}),
    ("/v1/chat/completions", _CHAT | {"tools": [_TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    ("/v1/chat/completions", _CHAT | {"functions": [_FUNCTION], "function_call": "auto"}),
    ("/v1/chat/completions", _CHAT | {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "$defs": {"A": _PARAMETERS}}}}}),
    ("/v1/chat/completions", _CHAT | {"structured_outputs": {"regex": "(a|b)+c{1,3}"}, "logprobs": True}),
    ("/v1/chat/completions", _CHAT | {"guided_grammar": 'root ::= "a" root | "b"', "logprobs": True}),
    ("/v1/chat/completions", _CHAT | {"logit_bias": {"5": -100, "7": 3.5}, "bad_words": ["a b"], "min_tokens": 1}),
    ("/v1/chat/completions", _CHAT | {"continue_final_message": True, "add_generation_prompt": False, "messages": [
        _USER, {"role": "assistant", "content": "It is"}]}),
    ("/v1/chat/completions", _CHAT | {"documents": [{"title": "a", "text": "b"}], "chat_template_kwargs": {"a": 1}}),
    ("/v1/chat/completions", _CHAT | {"chat_template": "default", "stop": "x"}),
    ("/invocations", _CHAT | {"n": 2}),
    ("/invocations", _TEXT | {"stream": True}),
    ("/v1/completions", _TEXT | {"echo": True, "logprobs": 2, "n": 2, "suffix": None}),
    ("/v1/completions", _TEXT | {"prompt": [[5, 6, 7], [8]], "prompt_logprobs": 1, "return_token_ids": True}),
    ("/v1/completions", _TEXT | {"prompt": ["a", "b"], "stream": True, "truncate_prompt_tokens": 2, "cache_salt": "s"}),
    ("/v1/completions", _TEXT | {"prompt": [5, 6], "allowed_token_ids": [5, 6, 7], "stop_token_ids": [9]}),
    ("/v1/responses", _RESPONSE | {"instructions": "Be brief.", "stream": True, "metadata": {"a": "b"}}),
    ("/v1/responses", _RESPONSE | {"tools": [_FUNCTION | {"type": "function"}], "input": [
        _USER, {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "sunny"}]}),
    ("/v1/responses", _RESPONSE | {"text": {"format": {"type": "json_schema", "name": "a", "schema": _PARAMETERS}}}),
    ("/v1/messages", _MESSAGE | {"system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["x"]}),
    ("/v1/messages", _MESSAGE | {"stream": True, "tools": [{"name": "weather", "input_schema": _PARAMETERS}],
                                 "tool_choice": {"type": "any"}}),
    ("/v1/messages", _MESSAGE | {"messages": [_USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Paris"}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": "sunny"}, {"type": "text", "text": "So?"}]}]}),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": [_USER]}),
    ("/tokenize", {"messages": [_USER], "return_token_strs": True}),
    ("/tokenize", {"prompt": "Hello"}),
    ("/tokenize", {"messages": _CALLED, "tools": [_TOOL], "chat_template_kwargs": {"a": [1]}}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, -(2**63) - 1, 10**40, 0.5, 1e308, -0.0, "", "a", "\ud800", "\0", "é" * 300, "{",
    [], [[]], {}, [None], ["a"] * 200, [0] * 5000, {"a": {"a": {"a": {}}}}, {"type": "object"}, {"$ref": "#"},
    {"type": "x"}, "(a+)+$", "[", "tool", "assistant", "required", "json_object", "function", {"": ""},
    128, 129, 2048, "a" * 5000,
]  # fmt: skip


def spoilt(chance: random.Random) -> tuple[str, bytes]:
    """A path and a body: one of the corpus with one to four changes, of values or of the text."""
    path, body = chance.choice(CORPUS)
    body = json.loads(json.dumps(body))
    for _ in range(chance.randint(1, 3)):
        _change(body, chance)
    data = json.dumps(body, ensure_ascii=True).encode()
    if chance.random() < 0.15:
        data = _garbled(data, chance)
    return path, data


def _change(body: Any, chance: random.Random) -> None:
    """One value, somewhere inside: another, moved, doubled, gone, or under another name."""
    places: list[tuple[Any, Any]] = []
    left = [body]
    while left:
        inner = left.pop()
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))[:50]
        places += [(inner, key) for key in keys]
        left += [inner[key] for key in keys if isinstance(inner[key], dict | list)]
    if not places:
        return
    where, key = chance.choice(places)
    match chance.randrange(6):
        case 0:
            del where[key]
        case 1:
            other, another = chance.choice(places)
            if another in other if isinstance(other, dict) else another < len(other):
                where[key] = json.loads(json.dumps(other[another]))
        case 2 if isinstance(where, dict):
            where[chance.choice(["", "type", "name", "content", "a" * 70, "stream"])] = where.pop(key)
        case 3 if isinstance(where, list):
            where += [where[key]] * chance.choice([1, 5, 200])
        case _:
            where[key] = json.loads(json.dumps(chance.choice(_VALUES)))


def _garbled(data: bytes, chance: random.Random) -> bytes:
    """Some bytes of it: others, gone, or twice."""
    at = chance.randrange(len(data))
    end = min(at + chance.choice([1, 2, 10, 100]), len(data))
    return data[:at] + chance.choice([b"", data[at:end] * 2, bytes([chance.randrange(256)]), b"[" * 2000]) + data[end:]
