"""The sampler against plain reference implementations and transformers' logits processors, and by statistics.

Catches: a stage that is wrong, out of order or applied to a neighbour; a draw that depends on the crowd or is biased.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.errors import RequestError
from cluster.router.logprobs import token_logprobs
from cluster.router.params import SamplingParams
from cluster.router.sampler import Sampler, adjust, candidates, draw, weigh
from cluster.router.sequence import Sequence
from cluster.router.token_mask import TokenMask
from cluster.router.token_masks import TokenMasks

V = 1000  # no multiple of the block that sums are taken over
PROMPT, OUTPUT = (5, 6, 7, 7, 900), (7, 11, 11, 11, 42)


def logits(n: int = 1, vocab_size: int = V, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (n, vocab_size)).astype(np.float32)


def sequence(*, output: Items[int] = OUTPUT, eos_ids: Items[int] = (2,), **params: Any) -> Sequence:
    grown = Sequence("r", PROMPT, SamplingParams(max_tokens=10_000, **params), eos_ids=eos_ids, emitted_ids=output[:2])
    for token in output[2:]:  # part of it came from another router, part of it is ours
        grown.append(token)
    return grown


def probabilities(row_V: np.ndarray, of: Sequence) -> np.ndarray:
    (mask,) = TokenMasks(V).begin([of]).result()
    assert not isinstance(mask, RequestError)
    logits_C, ids_C = candidates(adjust(row_V, of), mask)
    weights_C, weights_V = np.empty_like(logits_C), np.zeros_like(row_V)
    weigh(logits_C, of.params, weights_C)
    weights_V[slice(None) if ids_C is None else ids_C] = weights_C
    return weights_V / weights_V.sum(dtype=np.float64)


def transformers_probabilities(row_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[i], b] for i, b in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([[*PROMPT, *OUTPUT]]), torch.from_numpy(row_V)[None].clone())
    return scores[0].double().softmax(-1).numpy()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0, "top_k": 1},
        {"top_k": 50},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.999999},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"logit_bias": {7: 3.0, 8: -50.0, 999: 9.5}},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3,
         "logit_bias": {11: 4.0}},
    ],
    ids=str,
)  # fmt: skip
def test_distribution_is_that_of_transformers(params: dict[str, Any]) -> None:
    for seed in range(5):
        row_V = logits(seed=seed)[0]
        ours = probabilities(row_V, sequence(**params))
        theirs = transformers_probabilities(row_V, SamplingParams(max_tokens=1, **params))
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-12)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    row_V = logits()[0]
    changed_V = adjust(row_V, sequence(presence_penalty=0.5, frequency_penalty=0.25))
    expected_V = row_V.copy()
    for token in set(OUTPUT):
        expected_V[token] -= 0.5 + 0.25 * OUTPUT.count(token)
    np.testing.assert_allclose(changed_V, expected_V, atol=1e-6)


def test_repetition_penalty_goes_before_presence_and_frequency() -> None:
    row_V = logits()[0]
    expected = (row_V[11] / 2 if row_V[11] > 0 else row_V[11] * 2) - 0.5 - 3 * 0.25
    penalised = sequence(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert adjust(row_V, penalised)[11] == pytest.approx(expected, abs=1e-5)


def test_many_distinct_tokens_are_all_remembered() -> None:
    output = [*range(300), *range(150)]
    changed_V = adjust(np.zeros(V, np.float32), sequence(output=output, frequency_penalty=1.0))
    np.testing.assert_array_equal(changed_V[:400], [-2.0] * 150 + [-1.0] * 150 + [0.0] * 100)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_an_answer_before_min_tokens(temperature: float) -> None:
    row_SV = np.zeros((1, V), np.float32)
    row_SV[0, [2, 9, 30]] = 50, 40, 30
    sampler = Sampler(V)
    params = {"temperature": temperature, "stop_ids": (9,)}
    assert sampler.sample(row_SV, [sequence(min_tokens=6, **params)]) == [30]
    assert sampler.sample(row_SV, [sequence(min_tokens=6, ignore_eos=True, **params)]) == [2]
    assert sampler.sample(row_SV, [sequence(min_tokens=5, **params)]) == [2]


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.0, "min_tokens": 100},
    {"temperature": 0.0, "logit_bias": {3: 5.0}},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9},
    {"seed": 3, "top_k": 7, "min_p": 0.01},
    {"seed": 2**64 - 1, "presence_penalty": 1.0, "temperature": 1.4},
]


@settings(max_examples=30)
@given(crowd=st.lists(st.sampled_from(range(len(KINDS))), min_size=1, max_size=12), steps=st.integers(1, 3))
def test_the_same_tokens_alone_and_in_a_crowd(crowd: list[int], steps: int) -> None:
    together, alone = [sequence(**KINDS[kind]) for kind in crowd], [sequence(**KINDS[kind]) for kind in crowd]
    sampler, alone_sampler = Sampler(V), Sampler(V)
    for step in range(steps):
        rows_SV = logits(len(crowd), seed=step)
        before_SV = rows_SV.copy()
        for i, token in enumerate(sampler.sample(rows_SV, together)):
            together[i].append(token)
            alone[i].append(*alone_sampler.sample(rows_SV[i : i + 1], [alone[i]]))
        np.testing.assert_array_equal(rows_SV, before_SV)  # log-probabilities are taken from them afterwards
    assert [s.tokens for s in together] == [s.tokens for s in alone]


def test_a_continued_sequence_draws_the_same_tokens() -> None:
    rows_SV = logits(200)
    whole, sampler = sequence(output=(), seed=9), Sampler(V)
    for row_V in rows_SV:
        whole.append(*sampler.sample(row_V[None], [whole]))
    emitted = whole.tokens[whole.n_prompt :]
    for cut in (1, 63, 64, 65, 150):
        rest = sequence(output=emitted[:cut], seed=9)
        for row_V in rows_SV[cut:]:
            rest.append(*sampler.sample(row_V[None], [rest]))
        assert rest.tokens == whole.tokens


@pytest.mark.parametrize("params", [{}, {"temperature": 1.9, "top_p": 0.95}, {"top_k": 20, "min_p": 0.02}], ids=str)
def test_frequencies_of_sampled_tokens(params: dict[str, Any]) -> None:
    n, row_SV = 20_000, logits(vocab_size=300, seed=3)
    one, sampler = sequence(output=(), seed=11, **params), Sampler(300)
    drawn = []
    for _ in range(n):
        drawn += sampler.sample(row_SV, [one])
        one.append(drawn[-1])
    expected = probabilities(row_SV[0], one) * n
    counts = np.bincount(drawn, minlength=300)
    assert not counts[expected == 0].any()
    often = expected >= 5
    observed = [*counts[often], counts[~often].sum()] if expected[~often].sum() >= 1 else counts[often]
    wanted = [*expected[often], expected[~often].sum()] if expected[~often].sum() >= 1 else expected[often]
    assert chisquare(observed, np.array(wanted) * (np.sum(observed) / np.sum(wanted))).pvalue > 1e-3


def test_frequencies_over_seeds_at_one_position() -> None:
    row_SV = np.log(np.array([[0.5, 0.3, 0.2]], np.float32)).repeat(64, 0)
    sampler = Sampler(3)
    drawn = [
        token
        for first in range(0, 6400, 64)
        for token in sampler.sample(row_SV, [sequence(output=(), seed=first + i) for i in range(64)])
    ]
    assert chisquare(np.bincount(drawn), [3200, 1920, 1280]).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_a_draw_never_gives_a_token_of_no_weight(uniform: float) -> None:
    weights_V = np.zeros(1024, np.float32)
    weights_V[[300, 301, 700]] = 0.25, 1e-30, 0.25
    assert draw(weights_V, uniform) == (300 if uniform < 0.5 else 700)


def test_logits_that_are_not_finite_are_told_and_harm_no_neighbour() -> None:
    rows_SV = logits(4)
    rows_SV[0, 5] = np.nan
    rows_SV[1, 5] = np.inf
    rows_SV[2] = -np.inf
    tokens = Sampler(V).sample(rows_SV, [sequence(temperature=t) for t in (0.0, 1.0, 1.0, 0.0)])
    assert [str(token) for token in tokens[:3]] == ["the model gave logits that are not finite"] * 3
    assert tokens[3] == rows_SV[3].argmax()


def test_bad_words_are_not_completed() -> None:
    row_V = logits()[0]
    of = sequence(output=(7, 8), temperature=1.0, bad_words=((7, 8, 9), (8, 10), (9, 11), (12,)))
    assert set(np.nonzero(probabilities(row_V, of) == 0)[0]) == {9, 10, 12}


def test_only_allowed_tokens_are_drawn() -> None:
    of = sequence(temperature=1.0, allowed_ids=(999, 3, 500, 3), logit_bias={7: 100.0})
    assert set(np.nonzero(probabilities(logits()[0], of))[0]) == {3, 500, 999}


def test_the_stages_meet() -> None:
    """What a list allows, less bad words, less stops; stops stay where there is nothing else, and the filters see the
    candidates alone."""
    listed: dict[str, Any] = {"allowed_ids": (2, 3, 500, 999), "min_tokens": 99, "bad_words": ((42, 3),)}
    row_V = np.zeros(V, np.float32)
    row_V[[2, 500, 999]] = 5, 2, 1
    assert set(np.nonzero(probabilities(row_V, sequence(**listed)))[0]) == {500, 999}
    assert set(np.nonzero(probabilities(row_V, sequence(**listed, top_k=1)))[0]) == {500}
    only_stops = listed | {"allowed_ids": (2, 3)}
    assert set(np.nonzero(probabilities(row_V, sequence(**only_stops)))[0]) == {2}
    (nothing,) = Sampler(V).sample(row_V[None], [sequence(**listed | {"allowed_ids": (3,)})])
    assert isinstance(nothing, RequestError) and "no token" in str(nothing)


@given(st.lists(st.tuples(st.sets(st.integers(0, 99)), st.booleans()), min_size=1, max_size=4))
def test_masks_of_either_kind_are_joined(masks: list[tuple[set[int], bool]]) -> None:
    made = [TokenMask.only(ids) if allows else TokenMask.all_but(ids) for ids, allows in masks]
    joined = made[0]
    for each in made[1:]:
        joined &= each
    want = [token for token in range(100) if all((token in ids) == allows for ids, allows in masks)]
    assert [token for token in range(100) if (token in joined.ids_I) == joined.allows] == want
    assert list(joined.ids_I) == sorted(set(joined.ids_I)) and joined.is_empty == (joined.allows and not want)


@pytest.mark.parametrize("n_top", [0, 1, 5, V, V + 1])
def test_logprobs_are_those_of_the_raw_distribution(n_top: int) -> None:
    row_V = logits()[0]
    expected = torch.from_numpy(row_V).double().log_softmax(-1)
    result = token_logprobs(row_V, 17, n_top)
    assert result.logprob == pytest.approx(expected[17].item(), abs=1e-6)
    top = expected.topk(min(n_top, V))
    assert [token for token, _ in result.top] == top.indices.tolist()
    assert [logprob for _, logprob in result.top] == pytest.approx(top.values.tolist(), abs=1e-6)


def test_of_equal_logprobs_the_lower_id_comes_first() -> None:
    assert [token for token, _ in token_logprobs(np.zeros(10, np.float32), 0, 3).top] == [0, 1, 2]
