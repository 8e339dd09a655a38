"""Catches a format whose size is not what is allocated, or whose numbers are not those that were stored."""

from __future__ import annotations

import pytest
import torch

from workers.weights import FORMATS, IN_FILES, WeightFormat, format_of, kept_in


@pytest.mark.parametrize("made", FORMATS.values(), ids=FORMATS)
def test_a_matrix_takes_the_bytes_that_its_format_says_and_holds_what_was_stored(made: WeightFormat) -> None:
    torch.manual_seed(0)
    weight_ND = torch.randn(48, 32) * torch.logspace(-6, 2, 48)[:, None]  # outputs of very unlike sizes
    weight_ND[3] = 0
    weight_ND = weight_ND.to(made.made_of(torch.bfloat16).dtype)
    matrix = made.make(weight_ND)
    assert matrix.nbytes == made.bytes(48, 32)
    assert made.expert_bytes(32, 16) == made.make(weight_ND[:32]).nbytes + made.make(weight_ND[:32, :16]).nbytes
    held_ND = matrix.values_ND.float() * (1 if matrix.scale_N is None else matrix.scale_N[:, None])
    largest_N = weight_ND.float().abs().amax(1)
    error_N = (held_ND - weight_ND.float()).abs().amax(1)
    assert (error_N <= (largest_N / 16 if made.scaled else 0)).all()
    assert held_ND.isfinite().all() and not held_ND[3].any()


def test_what_a_checkpoint_stores_is_kept_only_where_it_can_be_computed_with() -> None:
    half, single = format_of(torch.float16), format_of(torch.float32)
    assert kept_in(half, {half, single}, torch.float32) == half
    assert kept_in(half, {single}, torch.bfloat16) == FORMATS["bfloat16"]
    assert all(each.made_of(torch.float16) in IN_FILES.values() for each in FORMATS.values()), "no file has it"
