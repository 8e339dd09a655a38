"""Would catch: log-probabilities that run ahead of their text or get lost, a stop before `min_tokens`, a shown end."""

from __future__ import annotations

import pytest

from cluster.gateway.detokenizer import Detokenizer, Pieces
from cluster.gateway.sequence_text import Delta, SequenceText
from cluster.router.params import Finish, StepOutput, TokenLogprobs

# One token per letter, a word, the two halves of "é", and an end.
VOCABULARY = ["a", "b", "c", "word", "Ã", "©", "<end>"]
PIECES = Pieces({t: i for i, t in enumerate(VOCABULARY)}, [6], {"type": "ByteLevel"})


def output(*tokens: str, finish: Finish | None = None, scored: bool = False) -> StepOutput:
    ids = tuple(VOCABULARY.index(token) for token in tokens)
    return StepOutput("r", ids, tuple(TokenLogprobs(-float(i)) for i in ids) if scored else (), finish=finish)


def sequence(*stops: str, min_tokens: int = 0) -> SequenceText:
    return SequenceText(Detokenizer(PIECES), stops, min_tokens)


def names(delta: Delta) -> list[str]:
    return [VOCABULARY[token.token_id] for token in delta.scored]


def test_a_token_that_ends_the_sequence_counts_and_has_no_text() -> None:
    text = sequence()
    assert text.feed(output("a")) == Delta("a")
    assert text.feed(output("b", "word", finish="stop")) == Delta("b", finish="stop")
    assert text.n_tokens == 3


def test_the_last_token_of_a_full_answer_is_shown() -> None:
    assert sequence().feed(output("a", "b", finish="length")) == Delta("ab", finish="length")


def test_an_end_without_tokens_shows_what_was_held_back() -> None:
    text = sequence("bcx")
    assert [text.feed(output(t)).text for t in "abc"] == ["a", "", ""]
    assert text.feed(output(finish="length")) == Delta("bc", finish="length")
    assert text.n_tokens == 3


def test_a_stop_string_ends_the_sequence_within_an_output() -> None:
    text = sequence("bc")
    assert text.feed(output("a", "b", "c", "word", scored=True)).text == "a"
    assert text.n_tokens == 3


def test_scores_come_with_the_text_and_not_before_it() -> None:
    text = sequence("bb")
    assert names(text.feed(output("a", scored=True))) == ["a"]
    assert names(text.feed(output("b", scored=True))) == []
    assert names(text.feed(output("c", scored=True))) == ["b", "c"]
    assert names(text.feed(output("b", scored=True))) == []
    assert names(text.feed(output("b", scored=True))) == []


def test_scores_of_half_a_character_are_kept_and_ordered() -> None:
    text = sequence()
    deltas = [text.feed(output(t, scored=True)) for t in ("Ã", "©", "a")]
    assert "".join(d.text for d in deltas) == "éa"
    assert [n for d in deltas for n in names(d)] == ["Ã", "©", "a"]
    assert [token.offset for d in deltas for token in d.scored] == [0, 0, 1]


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, ""), (1, "a"), (2, "aa")])
def test_stop_strings_wait_for_min_tokens(min_tokens: int, shown: str) -> None:
    text = sequence("a", min_tokens=min_tokens)
    deltas = [text.feed(output("a")) for _ in range(min_tokens + 1)]
    assert "".join(d.text for d in deltas) == shown
    assert [d.finish for d in deltas] == [None] * min_tokens + ["stop"]
