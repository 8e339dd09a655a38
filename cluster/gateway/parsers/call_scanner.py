"""Function calls in JSON that comes in pieces."""

from __future__ import annotations

import json

from cluster.gateway.parsers.parts import CallArguments, CallStart, Part

_NAME_KEYS = frozenset({"name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_ARGUMENTS_MARK = "[ARGS]"


class CallScanner:
    """Reads calls as models write them and gives name and arguments as soon as they are there.

    Takes objects with `name` and `arguments` (or `parameters`), one, several after another, or a list of them; and a
    bare name in front of an object of arguments. Arguments are passed on as they are written, so what a client joins
    from a stream is what it gets in one piece. `closed`: as many brackets were closed as opened, and some were.
    `names`: an object that names none of them is no call; empty: every name is one.
    """

    def __init__(self, first_index: int = 0, names: frozenset[str] = frozenset()) -> None:
        self.n_calls = first_index
        self._names = names
        self.closed = False
        self._brackets: list[str] = []
        self._level = 0  # brackets open inside a call's object; 0: not in one
        self._in_string = self._escaped = False
        self._bare = ""  # a name in front of its arguments
        self._key: str | None = None  # whose value is being read
        self._word = ""  # the string or value being read
        self._in_value = False
        self._name: str | None = None
        self._waiting = ""  # arguments that came before their name
        self._given = False  # whether the call had arguments

    def push(self, text: str) -> tuple[list[Part], str]:
        """The parts in `text`, and what follows the last bracket once `closed`."""
        parts: list[Part] = []
        for i, character in enumerate(text):
            if self.closed:
                return _joined(parts), text[i:]
            self._take(character, parts)
        return _joined(parts), ""

    def _take(self, c: str, parts: list[Part]) -> None:
        if self._in_string:
            self._in_string = self._escaped or c != '"'
            self._escaped = c == "\\" and not self._escaped
            self._read(c, parts)
        elif not self._level:
            self._outside(c, parts)
        elif len(self._brackets) == self._level:
            self._between(c, parts)
        else:
            self._nested(c, parts)

    def _outside(self, c: str, parts: list[Part]) -> None:
        """Around the objects of the calls."""
        if c == "{":
            self._brackets.append(c)
            self._level = len(self._brackets)
            if name := self._bare.strip().removesuffix(_ARGUMENTS_MARK).strip():
                self._bare, self._name, self._level = "", name, 1
                self._key, self._in_value = "arguments", True
                self._brackets.insert(0, "name")
                self._read(c, parts)
        elif c == "[" and not self._bare.strip() and not self._brackets:
            self._brackets.append(c)
        elif c == "]" and self._brackets:
            self._brackets.pop()
            self.closed = not self._brackets
        elif not self._brackets:
            self._bare += c

    def _between(self, c: str, parts: list[Part]) -> None:
        """In a call's object, between its keys and values or in a plain value."""
        if c == '"':
            self._in_string = True
            self._read(c, parts)
        elif c == ":" and not self._in_value:
            self._key, self._word, self._in_value = _string(self._word), "", True
        elif c in ",}":
            self._end_value(parts)
            if c == "}":
                self._end_call(parts)
        elif c in "{[":
            self._brackets.append(c)
            self._read(c, parts)
        else:
            self._read(c, parts)

    def _nested(self, c: str, parts: list[Part]) -> None:
        self._read(c, parts)
        if c == '"':
            self._in_string = True
        elif c in "{[":
            self._brackets.append(c)
        elif c in "}]":
            self._brackets.pop()
            if self._brackets == ["name"]:
                self._end_value(parts)
                self._end_call(parts)

    def _read(self, c: str, parts: list[Part]) -> None:
        """One more character of a key or a value."""
        if not self._in_value or self._key not in _ARGUMENT_KEYS:
            self._word += c
            return
        if c.isspace() and not self._given:
            return
        self._given = True
        if self._name is None:
            self._waiting += c
        else:
            self._start(parts)
            parts.append(CallArguments(self.n_calls, c))

    def _start(self, parts: list[Part]) -> None:
        if self._name:
            parts.append(CallStart(self.n_calls, self._name))
            self._name = ""

    def _end_value(self, parts: list[Part]) -> None:
        if self._in_value and self._key in _NAME_KEYS:
            name = _string(self._word)
            self._name = name if name and (not self._names or name in self._names) else None
            if self._name and self._waiting:
                self._start(parts)
                parts.append(CallArguments(self.n_calls, self._waiting))
        self._key, self._word, self._in_value = None, "", False

    def _end_call(self, parts: list[Part]) -> None:
        self._brackets.pop()
        if self._name is not None:  # "" where it has started
            self._start(parts)
            if not self._given:
                parts.append(CallArguments(self.n_calls, "{}"))
            self.n_calls += 1
        self._name, self._waiting, self._given, self._level = None, "", False, 0
        self.closed = not self._brackets


def _string(text: str) -> str:
    """The JSON string in `text`; "" where there is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _joined(parts: list[Part]) -> list[Part]:
    """The same with neighbouring pieces of arguments in one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, CallArguments) and isinstance(last, CallArguments) and last.index == part.index:
            joined[-1] = CallArguments(part.index, last.text + part.text)
        else:
            joined.append(part)
    return joined
