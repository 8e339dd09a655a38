"""The text of one answer, as it comes, to content, reasoning and function calls."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.gateway.parsers.call_scanner import CallScanner
from cluster.gateway.parsers.formats import END_THINK, THINK, ToolFormat
from cluster.gateway.parsers.parts import CallArguments, CallStart, Content, Part, Reasoning

_BETWEEN_CALLS = " \t\r\n;,"


class MessageParser:
    """Belongs to one sequence. `n_calls`: the calls so far.

    `tools`: calls are looked for in this format; `only_calls`: the whole answer is JSON of calls, as a grammar made it;
    `named`: the whole answer is the arguments of this function; `one_call`: what follows the first call is dropped.
    `names` of the functions: where calls have no mark, an object that names none of them is content.
    `thinks`: the answer may begin with reasoning; `is_thinking`: the prompt began it already.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        *,
        only_calls: bool = False,
        named: str | None = None,
        one_call: bool = False,
        names: frozenset[str] = frozenset(),
        thinks: bool = False,
        is_thinking: bool = False,
    ) -> None:
        self.n_calls = 0
        self._tools = tools
        self._named = named
        self._one_call = one_call
        self._names = names
        self._held = ""  # may be the beginning of a marker
        self._unread = ""  # since a call began, until its name was read: shown as it is if it never is
        self._called = False  # whether the scanner has found a call
        self._scanner: CallScanner | None = CallScanner() if only_calls else None
        self._take = self._first if thinks else self._calls if only_calls else self._content
        if is_thinking:
            self._take = self._reasoning_begins
        elif not thinks and not only_calls and tools is not None and not tools.opening:
            self._take = self._first
        self._thinks = thinks

    @property
    def reasons(self) -> bool:
        """Whether what comes next is reasoning, until its end is marked."""
        return self._take in (self._reasoning_begins, self._reasoning)

    def push(self, text: str) -> list[Part]:
        """What `text` adds."""
        if self._named is not None:
            return self._named_arguments(text)
        parts: list[Part] = []
        rest = self._held + text
        self._held = ""
        while rest:
            before, rest = rest, ""
            rest = self._take(before, parts)
        return parts

    def finish(self) -> list[Part]:
        """What was held back, once no more text comes."""
        parts: list[Part] = []
        if self._scanner is not None and self._unread.strip():
            parts.append(Content(self._unread))
        elif self._held:
            parts.append(Reasoning(self._held) if self._take == self._reasoning else Content(self._held))
        return parts

    # One method for each state: takes text, appends its parts, returns what the next state shall take.

    def _first(self, text: str, parts: list[Part]) -> str:
        """Before the first visible character."""
        seen = text.lstrip()
        if (self._thinks and seen and len(seen) < len(THINK) and THINK.startswith(seen)) or not seen:
            self._held = text
            return ""
        if self._thinks and seen.startswith(THINK):
            self._take = self._reasoning_begins
            return seen.removeprefix(THINK)
        if self._tools is not None and not self._tools.opening and seen[0] in "{[":
            self._begin_calls("")
            return seen
        self._take = self._content
        return text

    def _reasoning_begins(self, text: str, parts: list[Part]) -> str:
        seen = text.lstrip("\n")
        if seen:
            self._take = self._reasoning
        return seen

    def _reasoning(self, text: str, parts: list[Part]) -> str:
        before, marker, rest = _split(text, (END_THINK,))
        if before:
            parts.append(Reasoning(before))
        if not marker:
            self._held = rest
            return ""
        self._thinks, self._take = False, self._answer_begins
        return rest

    def _answer_begins(self, text: str, parts: list[Part]) -> str:
        """After reasoning."""
        seen = text.lstrip()
        if seen:
            self._take = self._first if self._scanner is None else self._calls
        return seen

    def _content(self, text: str, parts: list[Part]) -> str:
        markers = (self._tools.opening,) if self._tools is not None and self._tools.opening else ()
        before, marker, rest = _split(text, markers)
        if before:
            parts.append(Content(before))
        if not marker:
            self._held = rest
            return ""
        self._begin_calls(marker)
        return rest

    def _begin_calls(self, marker: str) -> None:
        self._scanner = CallScanner(self.n_calls, frozenset() if marker else self._names)
        self._unread, self._called, self._take = marker, False, self._calls

    def _calls(self, text: str, parts: list[Part]) -> str:
        assert self._scanner is not None
        found, rest = self._scanner.push(text)
        self._called |= bool(found)
        self._unread = "" if self._called else self._unread + text
        if self._one_call:
            found = [part for part in found if isinstance(part, CallStart | CallArguments) and part.index == 0]
        parts += found
        self.n_calls = min(self._scanner.n_calls, 1) if self._one_call else self._scanner.n_calls
        if self._scanner.closed:
            if self._unread:  # brackets, but no call in them
                parts.append(Content(self._unread.removesuffix(rest)))
            self._unread, self._take = "", self._after_calls
        return rest

    def _after_calls(self, text: str, parts: list[Part]) -> str:
        """Between calls, and after the last."""
        self._scanner = None
        seen = text.lstrip(_BETWEEN_CALLS)
        closing = self._tools.closing if self._tools is not None else ""
        opening = self._tools.opening if self._tools is not None else ""
        if not seen:
            return ""
        if closing and seen.startswith(closing):
            return seen.removeprefix(closing)
        if any(marker and marker.startswith(seen) for marker in (opening, closing)):
            self._held = seen
            return ""
        if opening and seen.startswith(opening):
            self._begin_calls(opening)
            return seen.removeprefix(opening)
        if not opening and seen[0] in "{[":
            self._begin_calls("")
            return seen
        self._take = self._content
        return seen

    def _named_arguments(self, text: str) -> list[Part]:
        assert self._named is not None
        start: list[Part] = [] if self.n_calls else [CallStart(0, self._named)]
        self.n_calls = 1
        return [*start, CallArguments(0, text)] if text else start


def _split(text: str, markers: Sequence[str]) -> tuple[str, str, str]:
    """Text before the first marker, the marker, what follows; without one: text, "", what may be one's beginning."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, marker = min(found)
        return text[:at], marker, text[at + len(marker) :]
    for size in range(min(max(map(len, markers), default=1) - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return text[:-size], "", text[-size:]
    return text, "", ""
