"""Would catch log-probabilities that point beside their token, or lose alternatives because two tokens look alike.

Over tokenizers of every kind that is served: what precedes a text, how white space and bytes are written, and how the
library trims its offsets differ between them, and what a client sees must not.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.gateway.logprobs import TokenNames
from cluster.gateway.tokenizer import Tokenizer
from cluster.router.params import TokenLogprobs
from tests.unit.cluster.gateway.fake_gateway import Served, serve

TEXTS = st.text(st.sampled_from("The capital of Paris. \n\té東🙂\u0301▁<s>"), max_size=40)
KINDS = ("byte level", "byte level, spaces before words", "byte level, trimmed", "sentence piece", "metaspace")


def variant(source: Path, path: Path, **parts: Any) -> Path:
    path.mkdir()
    definition = json.loads((source / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(definition | parts))
    (path / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    return path


@pytest.fixture(scope="module")
def paths(
    byte_level_path: Path, sentence_piece_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("kinds")
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    spaced, plain = level | {"add_prefix_space": True}, level | {"add_prefix_space": False}
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return dict(
        zip(
            KINDS,
            (
                byte_level_path,
                variant(byte_level_path, base / "spaced", pre_tokenizer=spaced, post_processor=spaced),
                variant(byte_level_path, base / "trimmed", pre_tokenizer=plain, post_processor=plain),
                sentence_piece_path,
                variant(sentence_piece_path, base / "meta", normalizer=None, pre_tokenizer=meta),
            ),
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def tokenizers(paths: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(path) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_offsets_lead_to_each_token_in_the_text(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids, offsets = tokenizer.encode(text), tokenizer.offsets(text)
    assert len(ids) == len(offsets)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    if tokenizer.pieces.single_bytes:
        text = text.replace("▁", " ")  # to these it is one
    for token_id, start, end in zip(ids, offsets, [*offsets[1:], len(text)], strict=False):
        if (shown := tokenizer.pieces.shown[token_id]) and token_id not in tokenizer.pieces.single_bytes:
            first = start == 0 and shown.startswith(" ")  # the space that the tokenizer puts before every text
            assert text[start:end] == shown or (first and text[:end] == shown[1:])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_token_ids_are_spelt_with_each_in_its_place(tokenizers: dict[str, Tokenizer], kind: str, seed: int) -> None:
    tokenizer, rng = tokenizers[kind], random.Random(seed)
    ids = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(20))]
    text, offsets = tokenizer.spell(ids)
    if not tokenizer.pieces.single_bytes:  # of bytes that are no characters the library shows each
        assert text == tokenizer.decode(ids, skip_special_tokens=False)
    names = TokenNames(tokenizer.pieces)
    for i, (token_id, offset) in enumerate(zip(ids, offsets, strict=True)):
        raw = tokenizer.token_bytes(token_id)
        if raw and names.name(token_id) == raw.decode(errors="replace"):
            assert text[offset:].startswith(raw.decode()) or (i == 0 and text.startswith(raw.decode()[1:]))


@pytest.mark.parametrize("prompt", ["France is", " Paris, 東", "", [1, 262, 261, 3 + 0xF0, 263], [262]])
def test_an_echoed_prompt_is_pointed_into(sentence_piece_path: Path, prompt: str | list[int]) -> None:
    """Every offset of the answer, prompt and continuation, streamed or not."""
    with serve(sentence_piece_path) as served:
        served.session.say(*served.tokenizer.encode("is Paris", add_special_tokens=False))
        whole = complete(served, prompt=prompt, echo=True, logprobs=1, max_tokens=3)
        choice = whole["choices"][0]
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert len(tokens) == whole["usage"]["total_tokens"]
        assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
        for token, start in zip(tokens, offsets, strict=True):
            if not token.startswith("bytes:") and (token != "<s>" or isinstance(prompt, list)):  # added, and not shown
                assert choice["text"][start:].startswith((token, token[1:] if start == 0 else token))


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_tokens_share_a_name(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    names = TokenNames(tokenizer.pieces)
    every = range(tokenizer.vocab_size + 10)
    assert len({names.name(token_id) for token_id in every}) == len(every)
    for token_id in every:
        assert bytes(names.named(token_id, 0.0)["bytes"]) == tokenizer.token_bytes(token_id)


def test_bytes_leave_their_name_to_the_token_that_was_learnt(tokenizers: dict[str, Tokenizer]) -> None:
    names = TokenNames(tokenizers["sentence piece"].pieces)
    assert names.name(3 + ord("a")) == "bytes:\\x61"
    assert names.name(3 + ord("b")) == "b"  # nothing else is called so
    assert names.name(3 + 0xF0) == "bytes:\\xf0"


def test_every_alternative_that_was_asked_for_is_there(
    sentence_piece_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(sentence_piece_path) as served:
        a = next(i for i in range(262, 300) if served.tokenizer.token_bytes(i) == b"a")
        likeliest = tuple((token_id, -1.0) for token_id in (a, 3 + ord("a"), 5))
        monkeypatch.setattr(served.session, "_score", lambda token_id, n: TokenLogprobs(-0.5, likeliest))
        answer = complete(served, prompt="France", logprobs=3, max_tokens=1)
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    assert {"a", "bytes:\\x61"} <= top.keys()


def complete(served: Served, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return dict(response.json())
