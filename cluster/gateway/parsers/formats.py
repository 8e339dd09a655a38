"""How model families write function calls and reasoning, and which of it a chat template teaches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls are JSON after `opening`; `closing` may follow. Without `opening` an answer that begins with a bracket is
    calls as a whole."""

    opening: str
    closing: str = ""
    mark: str = ""  # what a chat template that teaches the format holds; empty: `opening`
    arguments: str = "arguments"  # their key, beside `name`
    in_list: bool = False  # all calls are one list after one `opening`, not each an object of its own

    def written(self, calls: Sequence[str]) -> str:
        """`calls`, each an object as text, as the model writes them."""
        if self.in_list:
            return f"{self.opening}[{', '.join(calls)}]{self.closing}"
        return ("" if self.opening else "; ").join(f"{self.opening}{call}{self.closing}" for call in calls)

    def rule(self, opening: str, *, one_call: bool) -> str:
        """The right side of a Lark rule for calls, in which `@call` is one call, or the list of them. `opening`: the
        terminal of the mark before them."""
        once = " ".join(filter(None, (opening, "@call", self.closing and json.dumps(self.closing))))
        if one_call or self.in_list:
            return once
        return rf"({once} /\s*/)+" if self.opening else rf"{once} (/;\s*/ {once})*"


TOOL_FORMATS = {
    # Mistral and Mixtral Instruct: [TOOL_CALLS] [{"name": ..., "arguments": {...}}], later [TOOL_CALLS]name{...}
    "mistral": ToolFormat("[TOOL_CALLS]", in_list=True),
    # Hermes, Qwen 2.5, Qwen3, SmolLM2: <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    "hermes": ToolFormat("<tool_call>", "</tool_call>"),
    # Llama 3.1 on: {"name": ..., "parameters": {...}}, several separated by semicolons
    "llama3_json": ToolFormat("", mark='"parameters"', arguments="parameters"),
}
DEFAULT_FORMAT = "hermes"
THINK, END_THINK = "<think>", "</think>"


def tool_format_of(template: str) -> str | None:
    """The name of the format that the source of a chat template teaches; None where it knows nothing of tools."""
    if "tools" not in template:
        return None
    for name, found in TOOL_FORMATS.items():
        if (found.mark or found.opening) in template:
            return name
    return DEFAULT_FORMAT
