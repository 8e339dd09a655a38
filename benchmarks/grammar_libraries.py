"""What libraries take for a grammar: to compile it, for one mask, and in memory."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tokenizers
from llguidance.numpy import fill_next_token_bitmask
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.bench.common import cache_directory, console
from cluster.gateway.tokenizer import Tokenizer
from cluster.router import grammar
from cluster.router.grammar import GrammarCompiler

VOCABULARIES = (32_000, 150_000)
_CORPUS_BYTES = 120_000_000
_ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0},
        "name": {"type": "string", "minLength": 1, "maxLength": 80},
        "kind": {"enum": ["book", "tool", "food"]},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    },
    "required": ["id", "name", "kind", "price", "tags"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {"type": "array", "items": _ITEM, "minItems": 1000}
_ANSWER = json.dumps(
    [{"id": i, "name": f"The {i}th thing, with a name", "kind": "tool", "price": i / 7, "tags": ["new", "old"]}
     for i in range(8)]
)  # fmt: skip
_CHOICES = [f"answer number {i} of many" for i in range(1000)]
_REGEX, _DATED = r"([A-Z][a-z]+ ){1,4}on [0-9]{4}-[0-9]{2}-[0-9]{2}(, [a-z ]{1,60})*", "The Thing on 2024-05-17, of old"


def _vocabulary(size: int) -> Path:
    """A checkpoint directory with a byte-level BPE of `size` tokens, learnt once from what is installed here."""
    directory = cache_directory() / "bench" / f"bpe-{size}"
    if not (directory / "tokenizer.json").is_file():
        console.print(f"training a tokenizer of {size} tokens", style="dim")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, show_progress=False, special_tokens=["</s>"], max_token_length=32,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(_texts(), trainer)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def _texts() -> Iterator[str]:
    left = _CORPUS_BYTES
    for root in map(Path, sys.path):
        for file in sorted(root.rglob("*.py")) if root.is_dir() else ():
            text = file.read_text(encoding="utf-8", errors="replace")
            yield text
            if (left := left - len(text)) < 0:
                return


Mask = Callable[[Any], Callable[[int], None]]  # of a grammar: makes the mask before a token, then takes the token


def compare() -> list[tuple[str, ...]]:
    """Rows of vocabulary and grammar, library, ms to compile, us for a mask (median, 99th of a hundred), and MB: by how
    much a process grew with the vocabulary, or with the grammar. Times are the processor's, of all threads.
    """
    rows: list[tuple[str, ...]] = []
    for size in VOCABULARIES:
        directory = _vocabulary(size)
        for library in _LIBRARIES:
            # A process of its own: what another library freed would be taken again, unseen.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                try:
                    rows += process.submit(_rows, directory, library).result()
                except ImportError:
                    console.print(f"{library} is not installed")
    return sorted(rows, key=lambda row: (int(row[0].partition(",")[0]), row[0]))


def _rows(directory: Path, library: str) -> list[tuple[str, ...]]:
    tokenizer = Tokenizer(directory)
    before, began = _resident_mb(), time.process_time()
    make = _LIBRARIES[library](directory, tokenizer)
    took, grown = time.process_time() - began, _resident_mb() - before
    rows: list[tuple[str, ...]] = [(f"{tokenizer.vocab_size}", library, f"{took * 1e3:.0f}", "", "", f"{grown:.0f}")]
    asked = {
        "any JSON": ({"type": "object"}, json.dumps({"a": json.loads(_ANSWER)})),
        "a JSON schema": (SCHEMA | {"minItems": 1}, _ANSWER),
        "a regex": (_REGEX, _DATED),
        "1000 choices": (_CHOICES, _CHOICES[-1]),
    }
    for name, (what, answer) in asked.items():
        ids = tokenizer.encode(answer, add_special_tokens=False)
        before, began = _resident_mb(), time.process_time()
        step = make(what)
        compiled = time.process_time() - began
        times = []
        for _ in range(3):
            step = make(what)
            for token in ids:
                began = time.thread_time()
                step(token)
                times.append((time.thread_time() - began) * 1e6)
        rows.append((
            f"{tokenizer.vocab_size}, {name}", library, f"{compiled * 1e3:.1f}", f"{statistics.median(times):.0f}",
            f"{sorted(times)[int(len(times) * 0.99)]:.0f}", f"{_resident_mb() - before:.0f}",
        ))  # fmt: skip
    return rows


def _resident_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def _llguidance(directory: Path, tokenizer: Tokenizer) -> Mask:
    compiler = GrammarCompiler(directory, tokenizer.vocab_size, tokenizer.eos_ids)
    compiler.compile(grammar.from_choice(["a"])).result()  # reads the tokenizer
    masks = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.int32)

    def start(what: Any) -> Callable[[int], None]:
        make: Callable[[Any], str] = grammar.from_choice
        if not isinstance(what, list):
            make = grammar.from_json_schema if isinstance(what, dict) else grammar.from_regex
        matcher = compiler.compile(make(what)).result().deep_copy()

        def step(token: int) -> None:
            fill_next_token_bitmask(matcher, masks)
            assert matcher.consume_token(token)

        return step

    return start


def _xgrammar(_: Path, tokenizer: Tokenizer) -> Mask:
    import xgrammar  # type: ignore[import-not-found,import-untyped,unused-ignore]

    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    information = xgrammar.TokenizerInfo(pieces, xgrammar.VocabType.RAW, stop_token_ids=sorted(tokenizer.eos_ids))
    compiler = xgrammar.GrammarCompiler(information)
    masks = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.int32)

    def start(what: Any) -> Callable[[int], None]:
        if isinstance(what, dict):
            compiled = compiler.compile_json_schema(json.dumps(what), any_whitespace=True)
        elif isinstance(what, str):
            compiled = compiler.compile_regex(what)
        else:
            compiled = compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, what)))
        matcher = xgrammar.GrammarMatcher(compiled)

        def step(token: int) -> None:
            matcher.fill_next_token_bitmask(masks)
            assert matcher.accept_token(token)

        return step

    return start


_LIBRARIES: dict[str, Callable[[Path, Tokenizer], Mask]] = {"llguidance": _llguidance, "xgrammar": _xgrammar}
