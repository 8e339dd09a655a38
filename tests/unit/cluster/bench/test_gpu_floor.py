"""Catches a floor that counts experts where a layer has none, or forgets what stands beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.bench.gpu.ceilings import Ceilings
from cluster.bench.gpu.floor import decode_s, prefill_s
from cluster.bench.gpu.random_model import MIXTRAL_8X7B

TOP = Ceilings(copy=1.0, bf16=1.0)  # so that a second is a byte, or an operation
EXPERT_BYTES = 2 * 3 * 4096 * 14336


def test_mixtral_reads_what_it_is_known_to_read() -> None:
    """Of 46.7 billion parameters one token reads 12.9 billion, and its own keys and values."""
    assert decode_s(MIXTRAL_8X7B, 1, 0, EXPERT_BYTES, TOP) / 2 == pytest.approx(12.75e9, rel=0.01)
    all_of_it = decode_s(MIXTRAL_8X7B, 10_000, 0, EXPERT_BYTES, TOP)
    assert all_of_it / 2 == pytest.approx(46.57e9, rel=0.01), "without the embedding, of which rows are read"
    assert decode_s(MIXTRAL_8X7B, 2, 100, EXPERT_BYTES, TOP) > decode_s(MIXTRAL_8X7B, 2, 0, EXPERT_BYTES, TOP)


def test_a_layer_without_experts_counts_its_own_ffn() -> None:
    size = 18432
    some = replace(MIXTRAL_8X7B, dense_layers=frozenset(range(3)), dense_ffn_size=size, shared_ffn_size=2048)
    without = replace(some, dense_layers=frozenset(), dense_ffn_size=0)
    change = decode_s(some, 1, 0, EXPERT_BYTES, TOP) - decode_s(without, 1, 0, EXPERT_BYTES, TOP)
    sparse = 2 * EXPERT_BYTES + 2 * 4096 * (8 + 3 * 2048)
    assert change == pytest.approx(3 * (2 * 3 * 4096 * size - sparse))
    change = prefill_s(some, 1000, EXPERT_BYTES, TOP) - prefill_s(without, 1000, EXPERT_BYTES, TOP)
    assert change == pytest.approx(2 * 1000 * 3 * (3 * 4096 * size - 4096 * (2 * 3 * 14336 + 8 + 3 * 2048)))


def test_a_dense_model_has_a_floor() -> None:
    dense = replace(
        MIXTRAL_8X7B, n_experts=0, top_k=0, ffn_size=0, dense_layers=frozenset(range(32)), dense_ffn_size=14336
    )
    assert decode_s(dense, 1, 0, 0, TOP) / 2 == pytest.approx(7.1e9, rel=0.01)
