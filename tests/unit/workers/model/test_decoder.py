"""The dense half against transformers' MixtralForCausalLM in float32, over shapes that each would show a bug."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference import (
    CASES,
    EVERY_SHAPE,
    TOLERANCE,
    Paged,
    random_tokens,
    reference_logits,
    save_random,
    save_shape,
)
from workers.model.kv_cache import bytes_per_block

LENGTHS = {"a": 29, "b": 1, "c": 13, "d": 2, "e": 17}


@dataclass
class Case:
    """A directory, some sequences and what transformers says of them."""

    directory: Path
    tokens: dict[str, list[int]]
    logits: dict[str, Tensor]

    def check(self, name: str, begin: int, ours_NV: Tensor) -> None:
        expected_NV = self.logits[name][begin : begin + len(ours_NV)]
        assert ours_NV.dtype == torch.float32
        torch.testing.assert_close(ours_NV, expected_NV, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=EVERY_SHAPE, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    (family, shape), directory = request.param, tmp_path_factory.mktemp("model")
    model = save_shape(directory, family, shape, seed=len(shape))
    tokens = {name: random_tokens(model.config.vocab_size, n, seed=n) for name, n in LENGTHS.items()}
    return Case(directory, tokens, {name: reference_logits(model, ids) for name, ids in tokens.items()})


def test_prefill_at_once_and_in_chunks_that_cross_blocks_and_windows(case: Case) -> None:
    ours, token_ids = Paged(case.directory), case.tokens["a"]
    for name in ("b", "e"):
        case.check(name, 0, ours.step({name: case.tokens[name]})[0])
    for begin, end in ((0, 3), (3, 4), (4, 11), (11, 28), (28, 29)):
        case.check("a", begin, ours.step({"a": token_ids[begin:end]})[0])


def test_decode_token_by_token(case: Case) -> None:
    ours = Paged(case.directory)
    for position, token_id in enumerate(case.tokens["c"]):
        case.check("c", position, ours.step({"c": [token_id]})[0])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_mixed_batches_however_they_are_cut(case: Case, micro_batches: int) -> None:
    """Sequences of different lengths, some prefill, some decode; cuts fall inside sequences."""
    ours, done = Paged(case.directory), dict.fromkeys(case.tokens, 0)
    steps = ({"a": 9, "b": 1, "d": 1}, {"a": 1, "c": 12, "d": 1}, {"c": 1, "e": 5, "a": 19}, {"e": 1}, {"e": 11})
    for step in steps:
        rows = {name: case.tokens[name][done[name] : done[name] + n] for name, n in step.items()}
        for name, logits_NV in zip(step, ours.step(rows, micro_batches=micro_batches), strict=True):
            case.check(name, done[name], logits_NV)
            done[name] += step[name]
    assert done == {name: len(ids) for name, ids in case.tokens.items()}


def test_only_the_wanted_rows_come_back(case: Case) -> None:
    """Also where a micro-batch wants none of its rows, or is a single one."""
    for micro_batches in (2, 50):
        ours = Paged(case.directory)
        for name, logits_1V in zip(case.tokens, ours.step(case.tokens, True, micro_batches), strict=True):
            case.check(name, LENGTHS[name] - 1, logits_1V)


def test_a_chunk_of_which_no_logits_are_wanted(tmp_path: Path) -> None:
    """The first chunks of a long prompt: nothing comes back, but K and V are written."""
    reference = save_random(tmp_path)
    ours, token_ids = Paged(tmp_path), random_tokens(97, 12, seed=1)
    batch = ours.batch({"a": token_ids[:9]})
    batch_without = type(batch)(**{
        field: getattr(batch, field) if field != "logit_rows_R" else batch.logit_rows_R[:0]
        for field in batch.__dataclass_fields__
    })  # fmt: skip
    assert ours.model.forward([batch_without]).shape == (0, 97)
    logits_NV = ours.step({"a": token_ids[9:]})[0]
    torch.testing.assert_close(logits_NV, reference_logits(reference, token_ids)[9:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [*((family, torch.bfloat16, False) for family in CASES), ("mixtral", torch.float16, True)],
)
def test_a_checkpoint_of_16_bits_stays_so_and_computes_in_float32(
    tmp_path: Path, family: str, dtype: torch.dtype, tied: bool
) -> None:
    """Prefill and decode against transformers in float32; the steps of few rows against float32 weights, bit by bit."""
    reference = save_random(tmp_path, dtype=dtype, family=family, tie_word_embeddings=tied)
    token_ids = random_tokens(97, 150, seed=1)
    expected_NV = reference_logits(reference, token_ids)
    stored, widened = Paged(tmp_path), Paged(tmp_path, widened=True)
    for begin, end, same in ((0, 20, True), (20, 140, False)):
        logits_NV, widened_NV = (model.step({"a": token_ids[begin:end]})[0] for model in (stored, widened))
        torch.testing.assert_close(logits_NV, expected_NV[begin:end], rtol=0, atol=TOLERANCE)
        assert torch.equal(logits_NV, widened_NV) or not same
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        logits_NV, widened_NV = (model.step({"b": token_ids[begin:end]})[0] for model in (stored, widened))
        assert torch.equal(logits_NV, widened_NV)
        torch.testing.assert_close(logits_NV, expected_NV[begin:end], rtol=0, atol=TOLERANCE)


def test_bytes_per_block_is_what_the_pool_takes(tmp_path: Path) -> None:
    save_random(tmp_path)
    cache = Paged(tmp_path, n_blocks=3).cache
    pool_bytes = sum(pool.nbytes for pool in (*cache.k, *cache.v))
    assert 3 * bytes_per_block(Paged(tmp_path).spec, cache.block_size, torch.float32) == pool_bytes
