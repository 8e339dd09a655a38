"""Response objects and their events, as OpenAI writes them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.generation import Answer, Choice, Usage, parts_of
from cluster.gateway.parsers.parts import CallArguments, CallStart, Content, Part, Reasoning
from cluster.gateway.parsers.written import call_id
from cluster.gateway.responses.schemas import NamedFunctionTool, ResponsesRequest
from cluster.gateway.sequence_text import Delta, ScoredToken
from cluster.gateway.sse import dump

Item = dict[str, Any]
_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "user")


class ResponseForm:
    """One response: its output items, each with its events. `on_end` is called with the whole once it is complete."""

    done = b""

    def __init__(self, gateway: Gateway, body: ResponsesRequest, on_end: Callable[[Item], None]) -> None:
        self._on_end = on_end
        self._names = gateway.names
        self._n_top = body.n_logprobs or 0
        self._scored: list[ScoredToken] = []  # tokens that no text was sent for yet
        self._sequence_number = 0
        self._items: list[Item] = []
        self._finish: str | None = None
        text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text is not None else {}
        self._response: Item = {
            "id": f"resp_{secrets.token_hex(20)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": gateway.model.id,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": _choice(body.tool_choice),
            "tools": [
                {"description": None, "parameters": None, "strict": False} | tool.model_dump(exclude_none=True)
                for tool in body.tools or ()
            ],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "metadata": body.metadata or {},
        } | {name: getattr(body, name) for name in _ECHOED}

    def opening(self, choice: Choice, first: Delta) -> bytes:
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        self._scored += delta.scored
        data = b"".join(event for part in parts_of(choice, delta) for event in self._part(part))
        if delta.finish is not None:
            self._finish = delta.finish
            data += b"".join(self._close())
        return data

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        whole = self._end(usage)
        return self._event(f"response.{whole['status']}", response=whole)

    def error(self, error: RequestError) -> bytes:
        return self._event("error", code=error.code, message=str(error), param=error.param)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Item:
        answer = answers[0]
        self._finish = answer.finish
        self._scored = answer.scored
        parts = answer.parts if answer.choice.parser is not None else [Content(answer.text)]
        for part in parts:
            for _ in self._part(part):
                pass
        for _ in self._close():
            pass
        return self._end(usage)

    def _end(self, usage: Usage) -> Item:
        cut = self._finish == "length"
        whole = self._response | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }
        self._on_end(whole)
        return whole

    def _part(self, part: Part) -> Iterator[bytes]:
        """The events of one part; a part of another kind than the one before begins an item."""
        if isinstance(part, CallStart):
            item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
            yield from self._begin(item | {"call_id": call_id(), "name": part.name, "arguments": ""})
        elif isinstance(part, CallArguments):
            self._items[-1]["arguments"] += part.text
            yield self._more("response.function_call_arguments.delta", delta=part.text)
        elif isinstance(part, Reasoning):
            yield from self._text("reasoning", "rs", {"type": "reasoning_text", "text": ""}, part.text)
        else:
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._text("message", "msg", content, part.text)

    def _text(self, kind: str, prefix: str, content: Item, text: str) -> Iterator[bytes]:
        if not self._is_open(kind):
            item: Item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
            more: Item = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._begin(item | {"content": []} | more)
            self._items[-1]["content"].append(content)
            yield self._more("response.content_part.added", content_index=0, part=content)
        written = self._items[-1]["content"][0]
        written["text"] += text
        more = {}
        if kind == "message":
            more["logprobs"] = self._scores()
            written["logprobs"] += more["logprobs"]
        yield self._more(f"response.{content['type']}.delta", content_index=0, delta=text, **more)

    def _scores(self) -> list[Item]:
        """Those of the tokens since the last text."""
        scored, self._scored = self._scored, []
        return [
            self._names.named(token.token_id, token.logprobs.logprob)
            | {"top_logprobs": [self._names.named(*top) for top in token.logprobs.top[: self._n_top]]}
            for token in scored
        ]

    def _is_open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _begin(self, item: Item) -> Iterator[bytes]:
        yield from self._close()
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> Iterator[bytes]:
        """End the item that is being written, if there is one."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = "incomplete" if self._finish == "length" else "completed"
        if item["type"] == "function_call":
            called = {"arguments": item["arguments"], "name": item["name"]}
            yield self._more("response.function_call_arguments.done", **called)
        else:
            part = item["content"][0]
            done = f"response.{part['type']}.done"
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._more(done, content_index=0, text=part["text"], **more)
            yield self._more("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _more(self, kind: str, **fields: Any) -> bytes:
        """An event of the last item."""
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence_number} | fields
        self._sequence_number += 1
        return f"event: {kind}\ndata: {dump(data)}\n\n".encode("ascii")


def _choice(choice: str | NamedFunctionTool | None) -> Any:
    return choice.model_dump() if isinstance(choice, NamedFunctionTool) else choice or "auto"
