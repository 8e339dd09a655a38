"""Every limit at its border: what is just allowed passes, what is just beyond is refused by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import RequestError
from cluster.router import limits
from cluster.router.params import SamplingParams

VOCAB, CONTEXT = 100, 50

# field, what it is called in an error, allowed values, refused values
BORDERS: list[tuple[str, str, list[Any], list[Any]]] = [
    ("max_tokens", "max_tokens", [1, 47], [0, -1]),
    ("temperature", "temperature", [0.0, 2.0], [-0.01, 2.01, float("nan"), float("inf")]),
    ("top_k", "top_k", [0, 1, 10**6], [-1, 10**400]),
    ("top_p", "top_p", [0.0, 1e-9, 1.0], [-0.1, 1.01, float("nan")]),
    ("min_p", "min_p", [0.0, 1.0], [-0.1, 1.01]),
    ("repetition_penalty", "repetition_penalty", [0.01, 2.0], [0.0, -1.0, 2.01]),
    ("presence_penalty", "presence_penalty", [-2.0, 2.0], [-2.01, 2.01]),
    ("frequency_penalty", "frequency_penalty", [-2.0, 2.0], [-2.01, 2.01]),
    ("seed", "seed", [0, 2**64 - 1], [-1, 2**65]),
    ("stop_ids", "stop_token_ids", [(0, 99), tuple(range(64))], [(100,), (-1,), tuple(range(65))]),
    ("logit_bias", "logit_bias", [{0: -100.0, 99: 100.0}], [{100: 1.0}, {-1: 1.0}, {1: 100.1}, {1: float("nan")}]),
    ("min_tokens", "min_tokens", [0, 40], [-1, 41]),
    ("logprobs", "logprobs", [None, 0, 20], [-1, 21]),
    ("prompt_logprobs", "prompt_logprobs", [None, 0, 20], [-1, 21]),
]


def check(prompt_ids: list[int], **params: Any) -> None:
    limits.check(prompt_ids, SamplingParams(**({"max_tokens": 40} | params)), vocab_size=VOCAB, max_context=CONTEXT)


@pytest.mark.parametrize(("field", "allowed"), [(field, value) for field, _, good, _ in BORDERS for value in good])
def test_just_allowed(field: str, allowed: Any) -> None:
    check([1, 2, 3], **{field: allowed})


@pytest.mark.parametrize(
    ("field", "name", "refused"), [(field, name, value) for field, name, _, bad in BORDERS for value in bad]
)
def test_just_refused(field: str, name: str, refused: Any) -> None:
    with pytest.raises(RequestError) as caught:
        check([1, 2, 3], **{field: refused})
    assert (caught.value.code, caught.value.param, caught.value.status) == ("invalid_value", name, 400)


def test_a_context_may_be_full_and_no_more() -> None:
    check([1] * 10)
    with pytest.raises(RequestError) as caught:
        check([1] * 11)
    assert caught.value.code == "context_length_exceeded"
