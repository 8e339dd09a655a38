"""Would catch a model that is ready and then refuses every chat, because its tokenizer names ids it has no row for;
and a refusal that blames a field which the client never sent."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from cluster.errors import CheckpointError
from cluster.gateway.tokenizer import Tokenizer
from cluster.gateway.vocabulary import check_rows
from tests.unit.cluster.gateway.fake_gateway import serve


def test_as_many_rows_as_ids_or_more_are_nothing_to_tell(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    assert check_rows(tokenizer, tokenizer.vocab_size) == ""
    assert check_rows(tokenizer, tokenizer.vocab_size + 64) == ""


def test_ids_without_a_row_are_told_with_the_file(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    size = tokenizer.vocab_size
    note = check_rows(tokenizer, size - 3)
    assert f"{byte_level_path / 'tokenizer.json'}: ids {size - 3} to {size - 1} cannot be used" in note
    assert f"the model has {size - 3} rows" in note
    assert f": id {size - 1} cannot" in check_rows(tokenizer, size - 1)


def test_an_id_that_every_chat_needs_is_refused_before_the_start(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: the chat template needs the token '<\|im_end\|>' \(2\)"
    ):
        check_rows(tokenizer, 2)


def test_a_chat_that_names_such_a_token_is_told_so_of_its_messages(byte_level_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "The capital"}]}
    with serve(byte_level_path, vocab_size=50) as served:
        response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"].startswith("'messages' has a token id out of vocabulary")
