"""Grammars in the sampler, on random logits: a model that knows nothing must still write what is asked for.

Catches: a mask applied to another row or one token late, an end that is not allowed or not forced, a state that depends
on where the answer was begun, a grammar that ends more than its own request.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.errors import RequestError
from cluster.router import grammar
from cluster.router.grammar import Grammar, GrammarCompiler
from cluster.router.params import SamplingParams
from cluster.router.sampler import Sampler
from cluster.router.sequence import Sequence
from cluster.router.token_masks import listed

EOS, OTHER_EOS = 0, 1
V = 420  # the tokenizer's 400, and rows of padding, as models have them
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=["<end>", "<turn>"]
    )
    made.train_from_iterator([json.dumps(SCHEMA)] * 20, trainer)
    made.save(str(tmp_path_factory.mktemp("grammar") / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def compiler(tokenizer: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    path = tmp_path_factory.mktemp("compiler")
    tokenizer.save(str(path / "tokenizer.json"))
    return GrammarCompiler(path, V, (EOS, OTHER_EOS, 10_000))


def started(compiler: GrammarCompiler, source: str, emitted: Items[int] = (), **params: Any) -> Sequence:
    wanted = SamplingParams(max_tokens=400, grammar=source, **params)
    following = Grammar(compiler.compile(source), emitted) if source else None
    return Sequence("r", (5, 6), wanted, eos_ids=(EOS, OTHER_EOS), emitted_ids=emitted, grammar=following)


def run(sampler: Sampler, sequences: Items[Sequence]) -> None:
    """Until all have ended, on logits that are a function of the sequence alone."""
    while rows := [sequence for sequence in sequences if sequence.finish() is None]:
        begun = sampler.begin(rows)
        logits_SV = np.stack([_logits(sequence) for sequence in rows])
        for sequence, token in zip(rows, sampler.sample(logits_SV, rows, begun), strict=True):
            assert isinstance(token, int), token
            sequence.append(token)


def _logits(sequence: Sequence) -> np.ndarray:
    seed = [sequence.params.seed, *sequence.tokens]
    return np.random.default_rng(seed).normal(0, 2, V).astype(np.float32)


def text(tokenizer: tokenizers.Tokenizer, sequence: Sequence) -> str:
    emitted = sequence.tokens[sequence.n_prompt :]
    assert sequence.finish() == "stop" and emitted[-1] in (EOS, OTHER_EOS)
    return str(tokenizer.decode(emitted[:-1]))


def test_a_crowd_writes_what_each_is_asked(tokenizer: tokenizers.Tokenizer, compiler: GrammarCompiler) -> None:
    pattern, choices = r"[a-c]{3}-\d{2}", ("red", "green é", 'say "so"')
    kinds = [
        (grammar.from_json_schema(SCHEMA), lambda answer: validate(json.loads(answer), SCHEMA)),
        (grammar.from_regex(pattern), lambda answer: re.fullmatch(pattern, answer) or pytest.fail(answer)),
        (grammar.from_choice(choices), lambda answer: choices.index(answer)),
        (grammar.from_lark('start: "(" start ")" | "x"'), lambda answer: re.fullmatch(r"\(*x\)*", answer)[0]),
    ]
    wanted = [(*kinds[i % 4], started(compiler, kinds[i % 4][0], seed=i, ignore_eos=i % 3 == 0)) for i in range(24)]
    free = started(compiler, "", seed=99, min_tokens=40)
    run(Sampler(V), [sequence for _, _, sequence in wanted] + [free])
    for _, check, sequence in wanted:
        check(text(tokenizer, sequence))


def test_an_answer_goes_on_elsewhere_with_the_same_tokens(compiler: GrammarCompiler) -> None:
    source = grammar.from_json_schema(SCHEMA)
    whole = started(compiler, source, seed=7)
    run(Sampler(V), [whole])
    emitted = whole.tokens[whole.n_prompt :]
    for cut in random.Random(1).sample(range(1, len(emitted)), 5):
        rest = started(compiler, source, emitted[:cut], seed=7)
        run(Sampler(V), [rest])
        assert rest.tokens == whole.tokens


def test_min_tokens_does_not_outlast_the_grammar(tokenizer: tokenizers.Tokenizer, compiler: GrammarCompiler) -> None:
    sequence = started(compiler, grammar.from_choice(["a"]), min_tokens=2)
    run(Sampler(V), [sequence])
    assert tokenizer.decode(sequence.tokens[2:3]) == "a" and sequence.tokens[3] in (EOS, OTHER_EOS)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (grammar.from_json_schema({"type": "objekt"}), "objekt"),
        (grammar.from_regex("(("), "unclosed group"),
        (grammar.from_lark("start: nothing"), "nothing"),
        ("{", "EOF"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said_to_its_request_alone(
    compiler: GrammarCompiler, source: str, said: str
) -> None:
    broken, neighbour = started(compiler, source), started(compiler, grammar.from_choice(["b"]))
    error, token = Sampler(V).sample(np.stack([_logits(broken), _logits(neighbour)]), [broken, neighbour])
    assert isinstance(error, RequestError) and said in str(error) and error.code == "invalid_grammar"
    assert isinstance(token, int)


@settings(max_examples=50)
@given(st.integers(1, 200), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_packed_bits_are_listed(vocab_size: int, densities: list[float], seed: int) -> None:
    """Also where the library leaves bits beyond the vocabulary set."""
    chance = np.random.default_rng(seed)
    flags = chance.random((len(densities), -(-vocab_size // 32) * 32)) < np.array(densities)[:, None]
    masks = listed(np.packbits(flags, axis=1, bitorder="little").view(np.uint32), vocab_size)
    for mask, flags_V in zip(masks, flags[:, :vocab_size], strict=True):
        assert (np.isin(np.arange(vocab_size), mask.ids_I) == mask.allows).tolist() == flags_V.tolist()
        assert len(mask.ids_I) <= vocab_size / 2
