"""Messages and their events, as Anthropic writes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.generation import Answer, Choice, Usage, parts_of
from cluster.gateway.messages.errors import envelope
from cluster.gateway.parsers.parts import CallArguments, CallStart, Part, Reasoning
from cluster.gateway.parsers.written import Written
from cluster.gateway.sequence_text import Delta
from cluster.gateway.sse import dump


class MessageForm:
    """One answer: a stream of content blocks, or all of them."""

    done = b""

    def __init__(self, gateway: Gateway, n_prompt: int) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": gateway.model.id,
        }
        self._n_prompt = n_prompt
        self._block_size = gateway.config.block_size if gateway.config.prefix_cache else 0
        self._n_blocks = 0
        self._open: str | None = None  # kind of the block that is being written
        self._stop: dict[str, str | None] = {}

    def opening(self, choice: Choice, first: Delta) -> bytes:
        usage = {"input_tokens": self._n_prompt, "output_tokens": 0}
        message: dict[str, Any] = self._head | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event("message_start", {"message": message}) + _event("ping", {})

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        data = b"".join(self._part(part) for part in parts_of(choice, delta))
        if delta.finish is not None:
            data += self._close()
            self._stop = _stop(choice, delta.finish)
        return data

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        told = self._usage(usage)
        return _event("message_delta", {"delta": self._stop, "usage": told}) + _event("message_stop", {})

    def error(self, error: RequestError) -> bytes:
        return f"event: error\ndata: {dump(envelope(error))}\n\n".encode("ascii")

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        answer = answers[0]
        written = Written.of(answer.parts) if answer.choice.parser is not None else Written(content=answer.text)
        blocks: list[dict[str, Any]] = []
        if written.reasoning:
            blocks.append({"type": "thinking", "thinking": written.reasoning, "signature": ""})
        if written.content or not written.calls:
            blocks.append({"type": "text", "text": written.content})
        blocks += [
            {"type": "tool_use", "id": _use_id(), "name": call.name, "input": _object(call.arguments)}
            for call in written.calls
        ]
        told = self._usage(usage)
        return self._head | {"content": blocks} | _stop(answer.choice, answer.finish) | {"usage": told}

    def _usage(self, usage: Usage) -> dict[str, int]:
        """The prompt in three: read from the cache, left in it (as full blocks), and the rest."""
        cached, n_prompt = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
        left = max(n_prompt // self._block_size * self._block_size - cached, 0) if self._block_size else 0
        return {
            "input_tokens": n_prompt - cached - left,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": left,
            "output_tokens": usage["completion_tokens"],
        }

    def _part(self, part: Part) -> bytes:
        """The events of one part; a part of another kind than the one before begins a block."""
        if isinstance(part, CallStart):
            block = {"type": "tool_use", "id": _use_id(), "name": part.name, "input": {}}
            return self._begin("tool_use", block)
        if isinstance(part, CallArguments):
            return self._more({"type": "input_json_delta", "partial_json": part.text})
        if isinstance(part, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            more = {"type": "thinking_delta", "thinking": part.text}
        else:
            block = {"type": "text", "text": ""}
            more = {"type": "text_delta", "text": part.text}
        kind = str(block["type"])
        return (b"" if self._open == kind else self._begin(kind, block)) + self._more(more)

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        data = self._close()
        self._open = kind
        return data + _event("content_block_start", {"index": self._n_blocks, "content_block": block})

    def _more(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._n_blocks, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._n_blocks += 1
        return _event("content_block_stop", {"index": self._n_blocks - 1})


def _stop(choice: Choice, finish: str | None) -> dict[str, str | None]:
    found = choice.text.stop
    if choice.parser is not None and choice.parser.n_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if finish == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    return {"stop_reason": "stop_sequence" if found else "end_turn", "stop_sequence": found or None}


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; {} where the model was cut off or wrote no object."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _use_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {dump({'type': kind} | data)}\n\n".encode("ascii")
