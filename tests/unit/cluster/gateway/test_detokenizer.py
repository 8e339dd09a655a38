"""Would catch: split characters, lost or doubled spaces, a stream that differs from decoding all at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from cluster.gateway.detokenizer import Pieces
from cluster.gateway.tokenizer import Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "naïve café 東京 🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n\treturn  x\n\n\n  # ▁ Ġ",
    " leading and trailing ",
    "",
    "\x00\x7f\u2028",
]


@pytest.fixture(params=["byte_level_path", "sentence_piece_path"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_stream_are_the_text_decoded_at_once(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.detokenizer()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


def test_random_tokens_decode_as_the_library_decodes_them(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        stream = tokenizer.detokenizer()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_character_over_several_tokens_comes_whole(sentence_piece_path: Path) -> None:
    stream = Tokenizer(sentence_piece_path).detokenizer()
    ids = [3 + byte for byte in "🙂".encode()]
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]


def test_an_incomplete_character_at_the_end_is_shown_as_replaced(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    stream = tokenizer.detokenizer()
    first = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    stream = tokenizer.detokenizer()
    assert [stream.push(i) for i in (*tokenizer.eos_ids, tokenizer.vocab_size, 10**6)] == [""] * (
        len(tokenizer.eos_ids) + 2
    )


def test_the_first_space_counts_after_a_text_and_not_in_an_answer(sentence_piece_path: Path) -> None:
    tokenizer = Tokenizer(sentence_piece_path)
    (the,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b" The"]
    assert tokenizer.detokenizer().push(the) == "The"
    assert tokenizer.detokenizer(after_text=True).push(the) == " The"


def test_a_decoder_with_other_rules_is_refused() -> None:
    with pytest.raises(CheckpointError, match="WordPiece"):
        Pieces({"a": 0}, [], {"type": "WordPiece", "prefix": "##", "cleanup": True})


def test_a_tokenizer_without_decoder_has_whole_words() -> None:
    pieces = Pieces({"a": 0, "b": 1}, [], None)
    assert pieces.strips_first_space
    assert pieces.raw == [b" a", b" b"]
