"""Grammars that an answer follows: compiled and followed, by llguidance.

A grammar travels as text: llguidance's own JSON, whose `json_schema`, `regex` and `lark` entries `from_json_schema` and
its sisters make. The state of a matcher is a function of grammar and emitted tokens, so any router continues it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cluster.errors import RequestError

log = logging.getLogger(__name__)

_CACHED = 64  # compiled grammars
_WORKERS = 2  # threads that compile, which llguidance does without the GIL
# A compilation takes at most about a tenth of a second, the mask of one step some milliseconds.
_INITIAL_FUEL, _STEP_FUEL, _STEP_ITEMS, _GRAMMAR_SIZE = 2_000_000, 100_000, 50_000, 200_000
# Spaces where Python's `json.dumps` puts them and nowhere else: where any are allowed, small models write only these.
_JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def from_json_schema(schema: Mapping[str, Any]) -> str:
    """JSON that `schema` accepts. A `format` that is not enforced means nothing, as JSON Schema has it."""
    return LLMatcher.grammar_from_json_schema(_with_known_formats(dict(schema)), defaults=_JSON_LAYOUT)


_FORMATS = frozenset(["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"])
_DATA = ("const", "default", "enum", "examples")  # below them there are no schemas


def _with_known_formats(schema: Any, names: bool = False) -> Any:
    """`schema` without formats that cannot be enforced. `names`: its keys are names of properties."""
    if isinstance(schema, list):
        return [_with_known_formats(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _DATA and not names else _with_known_formats(value, key == "properties" and not names)
        for key, value in schema.items()
        if names or key != "format" or not isinstance(value, str) or value in _FORMATS
    }


def from_regex(pattern: str) -> str:
    """A text that `pattern` (the syntax of Rust's regex, without anchors) matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def from_lark(source: str) -> str:
    """A text of a context-free grammar in llguidance's dialect of Lark."""
    return LLMatcher.grammar_from_lark(source)


def from_lark_with(source: str, named: Mapping[str, str]) -> str:
    """As `from_lark`, where `@name` in `source` is a text of the grammar `named["name"]`."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": source}]
    for name, inner in named.items():
        # JSON where it was made of a schema, else Lark's syntax
        parts = json.loads(inner)["grammars"] if inner.startswith("{") else [{"lark_grammar": inner}]
        grammars += [parts[0] | {"name": name}, *parts[1:]]
    return json.dumps({"grammars": grammars})


def from_choice(choices: Sequence[str]) -> str:
    """One of `choices`."""
    return from_lark("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


class GrammarCompiler:
    """Compiles grammars for the tokenizer of one checkpoint, in threads of its own; keeps the latest. Thread-safe."""

    def __init__(self, checkpoint: str | Path, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """`vocab_size`: V, of the logits; `eos_ids` may end an answer whose grammar is complete.

        The tokenizer is read with the first grammar.
        """
        self._file = Path(checkpoint) / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_ids = sorted(token for token in eos_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """A matcher in its first state, not to be changed; RequestError of what is wrong with the grammar."""
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = self._threads.submit(self._compile, grammar)
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return future

    def _compile(self, grammar: str) -> LLMatcher:
        limits = LLParserLimits(
            initial_lexer_fuel=_INITIAL_FUEL,
            step_lexer_fuel=_STEP_FUEL,
            step_max_items=_STEP_ITEMS,
            max_grammar_size=_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._read_tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(_reason(matcher.get_error()), code="invalid_grammar")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if not self._eos_ids:
                    raise RequestError("the model has no token that ends an answer", code="unsupported_parameter")
                try:
                    self._tokenizer = LLTokenizer(str(self._file), n_vocab=self._vocab_size, eos_token=self._eos_ids)
                except BaseException as error:  # of the library, which raises several; a panic is no Exception
                    log.warning("%s: no grammar can be followed: %s", self._file, error)
                    message = "grammars cannot be followed with this model's tokenizer"
                    raise RequestError(message, code="unsupported_parameter") from error
            return self._tokenizer


class Grammar:
    """What the next token of one sequence may be. Belongs to the step loop, and lent to `token_masks` by it."""

    def __init__(self, compiled: Future[LLMatcher], emitted_ids: Sequence[int]) -> None:
        self._compiled = compiled
        self._emitted_ids = list(emitted_ids)
        self._matcher: LLMatcher | None = None

    def wait(self, timeout_s: float) -> bool:
        """Whether it is compiled, or failed to, within `timeout_s`."""
        try:
            self._compiled.exception(timeout_s)
        except TimeoutError:
            return False
        return True

    def check(self) -> None:
        """Raise RequestError where the grammar is wrong, or took more than it may, or the tokens do not follow it."""
        if self.matcher.is_error():
            raise RequestError(f"the grammar: {_reason(self.matcher.get_error())}", code="invalid_grammar")

    @property
    def matcher(self) -> LLMatcher:
        """After all tokens so far. Raises RequestError where the grammar cannot be compiled."""
        if self._matcher is None:
            matcher = self._compiled.result().deep_copy()
            matcher.consume_tokens(self._emitted_ids)
            self._matcher = matcher
        return self._matcher

    def append(self, token: int) -> None:
        """One more emitted token."""
        if self._matcher is None:
            self._emitted_ids.append(token)
        else:
            self._matcher.consume_token(token)


def _reason(error: str) -> str:
    """The library's message in one line, without the grammar that it repeats."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return (lines[-1] if lines and "error" in lines[-1] else " ".join(lines))[:500]
